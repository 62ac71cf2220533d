"""`/abort_request`: requests that are ended from another one keep what they have, give the engine back, and are their tenant's alone."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from engine.request import ImageInput, Prompt, SamplingParams, StepOutput, TokenLogprobs
from tests.contract.fake_engine import DEFAULT_REPLY, FakeBackend
from tests.contract.running import RunningServer, fake_config, running_server
from tests.vlm_server.byte_tokenizer import ByteTokenizer
from vision.shared_array import SharedArray
from vlm_server.aborting import AbortSwitch, RunningRequests
from vlm_server.detokenizer import Detokenizer
from vlm_server.generation import Answer, Delta, Generation
from vlm_server.metrics import Metrics
from vlm_server.protocol import CompletionRequest

HELLO = [{"role": "user", "content": "hi"}]
KEYS = ("mine", "theirs")


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RunningServer]:
    with running_server(fake_config(enable_abort_handling=True, api_keys=KEYS)) as server:
        yield server


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def post(server: RunningServer, path: str, *, key: str = "mine", version: str | None = None, **fields: Any) -> requests.Response:
    headers = {"authorization": f"Bearer {key}", "anthropic-version": version}
    return requests.post(f"{server.url}{path}", json=fields, headers=headers, timeout=10)


def post_chat(server: RunningServer, **fields: Any) -> requests.Response:
    return post(server, "/v1/chat/completions", **{"model": server.model, "messages": HELLO, "session_id": 7, **fields})


def post_completion(server: RunningServer, **fields: Any) -> requests.Response:
    return post(server, "/v1/completions", **{"model": server.model, "prompt": "hi", "session_id": 7, **fields})


def chunks_of(response: requests.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize("num_steps", [0, 5])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("how", [{"session_id": 7}, {"abort_all": True}], ids=str)
def test_an_aborted_chat_answers_with_what_it_has(
    server: RunningServer, threads: ThreadPoolExecutor, how: dict[str, Any], n: int, num_steps: int
) -> None:
    server.backend.engine.hangs_after = num_steps
    running = threads.submit(post_chat, server, n=n)
    assert server.backend.activity.has_begun_within(5)

    aborted = post(server, "/abort_request", **how)

    assert (aborted.status_code, aborted.content) == (200, b"")
    choices = running.result(10).json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["abort"] * n
    assert all(DEFAULT_REPLY.startswith(choice["message"]["content"]) for choice in choices)
    assert all(len(choice["message"]["content"]) <= num_steps for choice in choices)
    assert server.backend.activity.was_left_within(1)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_an_aborted_stream_ends_with_its_reason_and_its_usage(server: RunningServer, threads: ThreadPoolExecutor, path: str) -> None:
    server.backend.engine.hangs_after = 5
    send = post_chat if "chat" in path else post_completion
    running = threads.submit(send, server, stream=True, stream_options={"include_usage": True})
    assert server.backend.activity.has_begun_within(5)

    assert post(server, "/abort_request", session_id=7).status_code == 200

    *_, last, usage = chunks_of(running.result(10))
    assert last["choices"][0]["finish_reason"] == "abort"
    assert usage["usage"]["completion_tokens"] <= 5
    assert running.result().text.endswith("data: [DONE]\n\n")
    assert server.backend.activity.was_left_within(1)


@pytest.mark.parametrize("num_steps", [0, 5])
@pytest.mark.parametrize("stream", [False, True])
def test_an_aborted_response_is_cancelled_and_kept(
    server: RunningServer, threads: ThreadPoolExecutor, stream: bool, num_steps: int
) -> None:
    server.backend.engine.hangs_after = num_steps
    running = threads.submit(post, server, "/v1/responses", input="hi", stream=stream)
    assert server.backend.activity.has_begun_within(5)

    assert post(server, "/abort_request", abort_all=True).status_code == 200

    answered = running.result(10)
    response = chunks_of(answered)[-1]["response"] if stream else answered.json()
    assert not stream or chunks_of(answered)[-1]["type"] == "response.incomplete"
    assert (response["status"], response["incomplete_details"], response["completed_at"]) == ("cancelled", None, None)
    [message] = response["output"]
    assert message["status"] == "incomplete"
    assert DEFAULT_REPLY.startswith(response["output_text"])
    assert response["usage"]["output_tokens"] <= num_steps
    assert server.backend.activity.was_left_within(1)
    authorization = {"authorization": "Bearer mine"}
    assert requests.get(f"{server.url}/v1/responses/{response['id']}", headers=authorization, timeout=10).json() == response


@pytest.mark.parametrize("num_steps", [0, 5])
@pytest.mark.parametrize("stream", [False, True])
def test_an_aborted_message_says_it_is_cut(server: RunningServer, threads: ThreadPoolExecutor, stream: bool, num_steps: int) -> None:
    server.backend.engine.hangs_after = num_steps
    fields = {"model": server.model, "messages": HELLO, "max_tokens": 50, "stream": stream}
    running = threads.submit(post, server, "/v1/messages", version="2023-06-01", **fields)
    assert server.backend.activity.has_begun_within(5)

    assert post(server, "/abort_request", abort_all=True).status_code == 200

    answered = running.result(10)
    stop = chunks_of(answered)[-2]["delta"] if stream else answered.json()
    assert (stop["stop_reason"], stop["stop_sequence"]) == ("max_tokens", None)
    assert not stream or chunks_of(answered)[-1] == {"type": "message_stop"}
    assert server.backend.activity.was_left_within(1)


@pytest.mark.parametrize("how", [{"session_id": 7}, {"abort_all": True}], ids=str)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_alpacas_routes_can_be_aborted_too(threads: ThreadPoolExecutor, path: str, how: dict[str, Any]) -> None:
    asked = {"messages": HELLO} if "chat" in path else {"prompt": "hi"}
    with running_server(fake_config(enable_abort_handling=True, compat="alpaca", model_name="chinese-llama-alpaca")) as server:
        server.backend.engine.hangs_after = 5
        running = threads.submit(post, server, path, session_id=7, stream=True, **asked)
        assert server.backend.activity.has_begun_within(5)

        assert post(server, "/abort_request", **how).status_code == 200

        assert chunks_of(running.result(10))[-1]["choices"][0]["finish_reason"] == "abort"
        assert server.backend.activity.was_left_within(1)


def test_text_that_was_held_back_is_in_the_aborted_answer() -> None:
    answer = Answer(0, SamplingParams(logprobs=0), Detokenizer(ByteTokenizer(), stops=["STOP"]), includes_stop=False)
    scored = [TokenLogprobs(byte, -1.0, 1) for byte in b"one ST"]
    begun = answer.take(StepOutput(request_id="x", token_ids=[*b"one ST"], logprobs=scored))

    end = answer.abort()

    assert begun is not None
    assert (begun.text, end.text, end.finish_reason) == ("one ", "ST", "abort")
    assert [scored.token_id for scored in end.logprobs or ()] == [*b"ST"]
    assert (begun.token_ids, end.token_ids) == ([*b"one ST"], [])


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_picture_is_still_loaded_ends_at_once(server: RunningServer, threads: ThreadPoolExecutor, stream: bool) -> None:
    picture = {"type": "image_url", "image_url": {"url": "http://example.org/slow.png"}}
    running = threads.submit(post_chat, server, messages=[{"role": "user", "content": [picture]}], stream=stream)
    assert server.backend.activity.has_begun_within(5)

    assert post(server, "/abort_request", session_id=7).status_code == 200

    last = chunks_of(running.result(10))[-1] if stream else running.result(10).json()
    assert last["choices"][0]["finish_reason"] == "abort"
    assert server.backend.activity.was_left_within(1)
    assert not server.backend.engine.requests


def test_a_key_never_aborts_another_keys_requests(server: RunningServer, threads: ThreadPoolExecutor) -> None:
    server.backend.engine.hangs_after = 2
    running = threads.submit(post_chat, server, key="theirs")
    assert server.backend.activity.has_begun_within(5)

    by_number = post(server, "/abort_request", session_id=7)
    by_all = post(server, "/abort_request", abort_all=True)

    assert (by_number.status_code, by_all.status_code) == (400, 200)
    assert len(server.backend.activity) == 1, "it still runs"
    assert post(server, "/abort_request", key="theirs", session_id=7).status_code == 200
    assert running.result(10).json()["choices"][0]["finish_reason"] == "abort"


def test_only_the_named_request_ends(server: RunningServer, threads: ThreadPoolExecutor) -> None:
    server.backend.engine.hangs_after = 2
    running = {number: threads.submit(post_completion, server, session_id=number) for number in (1, 2)}
    assert server.backend.activity.has_begun_within(5, count=2)

    assert post(server, "/abort_request", session_id=1).status_code == 200

    assert running[1].result(10).json()["choices"][0]["finish_reason"] == "abort"
    assert len(server.backend.activity) == 1
    assert post(server, "/abort_request", session_id=2).status_code == 200
    running[2].result(10)


def test_a_request_that_has_ended_is_unknown(server: RunningServer) -> None:
    assert post_chat(server).json()["choices"][0]["finish_reason"] == "stop"
    assert chunks_of(post_chat(server, stream=True))
    assert post_chat(server, temperature=3).status_code == 400

    error = post(server, "/abort_request", session_id=7)

    assert error.status_code == 400
    assert (error.json()["error"]["code"], error.json()["error"]["param"]) == ("unknown_session", "session_id")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "session_id"),
        ({"session_id": -1}, "session_id"),
        ({"session_id": "x"}, "session_id"),
        ({"abort_all": "maybe"}, "abort_all"),
        ({"abort_all": True, "abort_message": "enough"}, "abort_message"),
        ({"abort_all": True, "finished_reason": "stop"}, "finished_reason"),
    ],
)
def test_what_cannot_be_aborted_is_refused_by_name(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    response = post(server, "/abort_request", **fields)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_nulls_and_unknown_fields_do_no_harm(server: RunningServer) -> None:
    response = post(server, "/abort_request", abort_all=True, session_id=None, abort_message=None, rid="x")

    assert response.json() == {"warnings": ["rid: no API documents this field; it has no effect"]}


def test_without_its_flag_nothing_can_be_aborted_and_a_number_has_no_effect() -> None:
    with running_server() as server:
        response = post(server, "/abort_request", abort_all=True)
        named, unnamed = post_chat(server).json(), post_chat(server, session_id=-1).json()

    assert response.status_code == 501
    assert "--enable-abort-handling" in response.json()["error"]["message"]
    assert named["warnings"] == ["session_id: it has no effect without --enable-abort-handling"]
    assert "warnings" not in unnamed


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("num_read", [1, 4, 7])
async def test_the_engine_is_free_at_once_though_nobody_reads_the_answer(n: int, num_read: int) -> None:
    backend, switch = FakeBackend(), AbortSwitch()
    backend.engine.hangs_after = 10
    body = CompletionRequest(model="m", prompt="hi", n=n)
    prompt = Prompt(token_ids=(104, 105), cache_keys=(104, 105))
    generation = Generation(
        backend.engine, ByteTokenizer(), [prompt], SamplingParams(), body, request_id="x", metrics=Metrics(), abort=switch
    )
    deltas = generation.deltas()
    pieces = [await anext(deltas) for _ in range(num_read)]

    switch.set()
    for _ in range(10):
        await asyncio.sleep(0)

    assert len(backend.activity) == 0
    pieces += [delta async for delta in deltas]
    for index in range(n):
        own = [piece for piece in pieces if piece.index == index]
        assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + ["abort"]
        assert "".join(piece.text for piece in own).encode() == bytes(token_id for piece in own for token_id in piece.token_ids)
    assert generation.usage().completion_tokens == sum(len(piece.token_ids) for piece in pieces)


async def test_an_answer_that_is_aborted_before_its_first_token_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, switch, metrics, measured = FakeBackend(), AbortSwitch(), Metrics(), []
    backend.engine.hangs_after = 0
    for name in ("first_token", "next_token", "stages_measured"):
        monkeypatch.setattr(metrics, name, measured.append)
    body = CompletionRequest(model="m", prompt="hi")
    prompt = Prompt(token_ids=(104,), cache_keys=(104,))
    generation = Generation(
        backend.engine, ByteTokenizer(), [prompt], SamplingParams(), body, request_id="x", metrics=metrics, abort=switch
    )

    switch.set()
    deltas = [delta async for delta in generation.deltas()]

    assert [delta.finish_reason for delta in deltas] == ["abort"]
    assert measured == []
    assert (generation.first_s, generation.last_s) == (None, None)


@pytest.mark.parametrize("num_read", [1, 99])
async def test_pictures_are_let_go_when_the_answers_end_or_are_left(num_read: int) -> None:
    """At once, and not when the garbage collector comes by: what a cancelled task held is in circles."""
    backend = FakeBackend()
    pixels = SharedArray.create((2, 2), "uint8")
    prompt = Prompt(token_ids=(104,), cache_keys=(104,), images=(ImageInput(b"hash", 1, {"pixel_values": pixels}),))
    body = CompletionRequest(model="m", prompt="hi", n=2)
    generation = Generation(backend.engine, ByteTokenizer(), [prompt], SamplingParams(), body, request_id="x", metrics=Metrics())

    deltas = generation.deltas()
    async for _ in first_of(deltas, num_read):
        assert pixels.fd >= 0
    await deltas.aclose()

    assert pixels.fd == -1


async def first_of(items: AsyncIterator[Delta], count: int) -> AsyncIterator[Delta]:
    for _ in range(count):
        try:
            yield await anext(items)
        except StopAsyncIteration:
            return


def test_a_switch_that_is_set_early_or_twice_calls_once() -> None:
    calls: list[int] = []
    switch = AbortSwitch()
    switch.set()

    switch.when_set(lambda: calls.append(1))
    switch.set()

    assert calls == [1]


def test_requests_are_forgotten_when_they_end() -> None:
    running, switch = RunningRequests(), AbortSwitch()
    running.begin(switch, "me", 1)

    running.end(switch)

    assert (running.abort("me", 1), running.abort_all("me"), len(running), switch.is_set) == (False, False, 0, False)
