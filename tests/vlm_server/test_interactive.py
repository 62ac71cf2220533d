"""`/v1/chat/interactive` over a scripted engine: what is kept between turns, what is not, and what each turn answers."""

import asyncio
import contextlib
import itertools
import json
import socket
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import requests

from engine.request import QueueFullError, SamplingParams
from tests.contract.fake_engine import DEFAULT_REPLY, SESSION_LEN, FakeBackend
from tests.contract.running import RunningServer, fake_config, running_server, serving
from tests.redis_server import redis_server
from tests.vlm_server.byte_tokenizer import EOS, IMAGE
from vlm_server import turns
from vlm_server.app import create_app
from vlm_server.response_schema import InteractiveResponse
from vlm_server.sessions.history import SessionBusyError
from vlm_server.sessions.store import RecordId, RecordStore, StoreError

PATH = "/v1/chat/interactive"
ZEROS = {"text": "", "tokens": 0, "input_tokens": 0, "history_tokens": 0, "finish_reason": "stop"}
NUM_REPLY_TOKENS = len(DEFAULT_REPLY.encode()) + 1
PICTURE = "https://example.org/tiger.jpeg"

_numbers = itertools.count(1)


@pytest.fixture
def number() -> int:
    """Of a session that no other test has."""
    return next(_numbers)


def post(server: RunningServer, *, key: str = "none", **fields: Any) -> requests.Response:
    return requests.post(server.url + PATH, json=fields, headers={"Authorization": f"Bearer {key}"}, timeout=10)


def turn(server: RunningServer, prompt: Any, number: int, **fields: Any) -> dict[str, Any]:
    """A turn that is kept."""
    response = post(server, prompt=prompt, session_id=number, interactive_mode=True, **fields)
    assert response.status_code == 200, response.text
    return dict(response.json())


def lines_of(response: requests.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in response.text.splitlines()]


def asked(server: RunningServer) -> list[int]:
    """The prompt that the engine got last."""
    return list(server.backend.engine.requests[-1][0].token_ids)


def total(answer: dict[str, Any]) -> int:
    return int(answer["history_tokens"] + answer["input_tokens"] + answer["tokens"])


def assert_refused(response: requests.Response, status: int, code: str, param: str | None) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)


def test_a_turn_answers_with_lmdeploys_five_fields(server: RunningServer, number: int) -> None:
    response = post(server, prompt="Hello! How are you?", session_id=number, interactive_mode=True)

    assert response.headers["content-type"] == "application/json"
    assert response.json() == {
        "text": DEFAULT_REPLY,
        "tokens": NUM_REPLY_TOKENS,
        "input_tokens": len(asked(server)),
        "history_tokens": 0,
        "finish_reason": "stop",
    }


def test_absent_and_null_fields_take_the_routes_own_defaults(server: RunningServer) -> None:
    nulls = dict.fromkeys(
        ("image_url", "session_id", "interactive_mode", "stream", "stop", "request_output_len", "top_p", "top_k", "temperature", "cancel")
    )

    for fields in ({}, {**nulls, "messages": None, "adapter_name": None, "seed": 0, "repetition_penalty": None, "min_p": None}):
        assert post(server, prompt="hi", **fields).status_code == 200
        assert server.backend.engine.requests[-1][1] == SamplingParams(temperature=0.8, top_p=0.8, top_k=40)


def test_every_sampling_field_reaches_the_engine(server: RunningServer) -> None:
    fields = {"temperature": 0.5, "top_p": 0.75, "top_k": 7, "min_p": 0.25, "repetition_penalty": 1.5, "seed": 11, "ignore_eos": True}

    response = post(server, prompt="hi", request_output_len=9, min_new_tokens=2, **fields)

    assert response.json()["finish_reason"] == "length"
    assert server.backend.engine.requests[-1][1] == SamplingParams(max_tokens=9, min_tokens=2, **fields)  # type: ignore[arg-type]


def test_a_stop_string_and_shown_special_tokens_have_their_effect(server: RunningServer) -> None:
    server.backend.engine.script = lambda prompt, params: [*b"one ", IMAGE, *b"two STOP three", EOS]

    plain = post(server, prompt="hi", stop="STOP").json()
    shown = post(server, prompt="hi", stop=["STOP"], skip_special_tokens=False).json()

    assert (plain["text"], plain["finish_reason"]) == ("one two ", "stop")
    assert shown["text"] == "one <image>two "


def test_a_later_turn_is_put_behind_all_that_was_said(server: RunningServer, number: int) -> None:
    answers = []
    for words in ("hi, what's your name?", "who developed you?", "Tell me more"):
        before = asked(server) if answers else []
        answers.append(turn(server, words, number))
        said = [*before, *DEFAULT_REPLY.encode(), EOS] if before else []
        assert asked(server)[: len(said)] == said
        assert bytes(asked(server)[len(said) or 1 :]) == f"user: {words}\nassistant: ".encode()

    for earlier, later in itertools.pairwise(answers):
        assert later["history_tokens"] == total(earlier)
    messages, _ = server.backend.pipeline.turns[-1]
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert messages[1]["content"] == DEFAULT_REPLY


def test_without_interactive_mode_the_history_is_used_once_more_and_the_session_ends(server: RunningServer, number: int) -> None:
    first = turn(server, "one", number)

    second = post(server, prompt="two", session_id=number, interactive_mode=False).json()
    third = turn(server, "three", number)

    assert second["history_tokens"] == total(first)
    assert third["history_tokens"] == 0


def test_without_a_session_nothing_is_kept_and_the_answer_says_so_if_asked_to(server: RunningServer) -> None:
    for fields in ({}, {"session_id": -1}, {"interactive_mode": True}):
        answer = post(server, prompt="hi", **fields).json()
        assert answer["history_tokens"] == 0
        assert answer.get("warnings") == (
            ["interactive_mode: without a session_id nothing is kept"] if fields.get("interactive_mode") else None
        )


def test_any_number_names_a_session(server: RunningServer) -> None:
    for number in (0, -2, 2**63 - 1, -(2**63)):
        first = turn(server, "hi", number)
        assert turn(server, "hi", number)["history_tokens"] == total(first)
    assert_refused(post(server, prompt="hi", session_id=2**63), 400, "invalid_value", "session_id")


@pytest.mark.parametrize("stream", [False, True])
def test_an_empty_prompt_of_no_length_ends_the_session(server: RunningServer, number: int, stream: bool) -> None:
    turn(server, "hi", number)

    for session_id in (number, next(_numbers), -1):
        ended = post(server, prompt="", session_id=session_id, interactive_mode=False, request_output_len=0, stream=stream)
        assert lines_of(ended) == [ZEROS]

    assert turn(server, "again", number)["history_tokens"] == 0


def test_the_end_waits_for_a_running_turn(server: RunningServer, number: int) -> None:
    turn(server, "hi", number)
    with running_turn(server, number) as running:
        ending: list[requests.Response] = []
        end = {"prompt": "", "session_id": number, "interactive_mode": False, "request_output_len": 0}
        thread = threading.Thread(target=lambda: ending.append(post(server, **end)))
        thread.start()
        running.close()
        thread.join(10)

    assert ending[0].json() == ZEROS
    assert turn(server, "again", number)["history_tokens"] == 0


async def test_ends_that_wait_for_a_turn_of_this_server_do_not_ask_the_store_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_POLL_S", 0.0)
    session_id, has_ended, num_asked = RecordId("sessions", "", "1"), asyncio.Event(), 0

    class BusySessions:
        async def end(self, session_id: RecordId) -> None:
            nonlocal num_asked
            num_asked += 1
            if not has_ended.is_set():
                raise SessionBusyError

    running: Any = SimpleNamespace(task=asyncio.create_task(has_ended.wait()))
    all_turns = turns.Turns(cast(Any, BusySessions()), cast(Any, None))
    all_turns._running[session_id] = running

    ends = [asyncio.create_task(all_turns.end(session_id)) for _ in range(3)]
    for _ in range(20):
        await asyncio.sleep(0)
    assert num_asked == 3
    has_ended.set()
    await asyncio.gather(*ends)

    assert num_asked == 6


def test_an_empty_prompt_is_a_turn_like_any_other(server: RunningServer, number: int) -> None:
    assert turn(server, "", number)["text"] == DEFAULT_REPLY


def test_messages_are_another_name_of_prompt_and_both_may_be_a_whole_history(server: RunningServer, number: int) -> None:
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "image_url", "image_url": PICTURE}]},
    ]

    prompts = []
    for field in ("prompt", "messages"):
        assert post(server, **{field: history}).status_code == 200
        assert post(server, **{field: history}, session_id=number, interactive_mode=True).status_code == 200
        prompts += [asked(server), server.backend.engine.requests[-2][0].token_ids]
        number = next(_numbers)

    assert len({tuple(prompt) for prompt in prompts}) == 1
    assert post(server, messages="hi").json()["text"] == DEFAULT_REPLY


def test_pictures_stand_before_the_text_of_their_turn(server: RunningServer) -> None:
    for image_url in (PICTURE, [PICTURE, "data:x"], []):
        assert post(server, prompt="What?", image_url=image_url).status_code == 200
        [message] = server.backend.pipeline.turns[-1][0]
        urls = [image_url] if isinstance(image_url, str) else image_url
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        assert message["content"] == ([*parts, {"type": "text", "text": "What?"}] if parts else "What?")


def test_a_path_on_the_server_is_a_file_url(server: RunningServer) -> None:
    """Which the vision service refuses, save under the allowed folder."""
    post(server, prompt="What?", image_url="/data/my picture.png")

    [message] = server.backend.pipeline.turns[-1][0]
    assert message["content"][0]["image_url"]["url"] == "file:///data/my%20picture.png"


def test_a_kept_picture_is_fetched_once_and_its_file_goes_with_every_later_turn(server: RunningServer, number: int) -> None:
    turn(server, "Describe it", number, image_url=PICTURE)
    turn(server, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:y", "detail": "low"}}]}], number)
    turn(server, "And now?", number)

    messages, files = server.backend.pipeline.turns[-1]
    images = [part["image_url"] for message in messages for part in message["content"] if isinstance(part, dict) and "image_url" in part]
    assert [files[image["url"]] for image in images] == [PICTURE.encode(), b"data:y"]
    assert [image.get("detail") for image in images] == [None, "low"]
    assert all(image["url"].startswith("session-picture:") for image in images)


@pytest.mark.parametrize("interactive_mode", [False, True])
def test_a_bad_picture_names_its_field_and_leaves_the_session_as_it_was(server: RunningServer, number: int, interactive_mode: bool) -> None:
    first = turn(server, "hi", number)
    part = {"type": "image_url", "image_url": {"url": "bad"}}

    for fields, param in (
        ({"prompt": "x", "image_url": "bad"}, "image_url"),
        ({"prompt": "x", "image_url": [PICTURE, "bad"]}, "image_url[1]"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]}, "prompt[0].content[1].image_url"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": [part]}]}, "messages[1].content[0].image_url"),
    ):
        response = post(server, session_id=number, interactive_mode=interactive_mode, **fields)
        assert_refused(response, 400, "image_decode_failed", param)

    assert turn(server, "again", number)["history_tokens"] == total(first)


def test_a_sessions_pictures_have_a_limit_together() -> None:
    with running_server(fake_config(max_session_bytes=len(PICTURE) + 10)) as server:
        turn(server, "one", 1, image_url=PICTURE)

        response = post(server, prompt="two", image_url=PICTURE + "x", session_id=1, interactive_mode=True)

        assert_refused(response, 400, "image_too_large", "image_url")
        assert post(server, prompt="two", image_url=PICTURE + "x").status_code == 200


def test_a_picture_that_a_session_has_takes_nothing_of_its_limit_again() -> None:
    with running_server(fake_config(max_session_bytes=len(PICTURE) + 10)) as server:
        turn(server, "one", 1, image_url=[PICTURE, PICTURE])
        turn(server, "two", 1, image_url=PICTURE)
        turn(server, "three", 1, image_url=[PICTURE, "data:y"])

        response = post(server, prompt="four", image_url=[PICTURE, "data:z", "data:zz"], session_id=1, interactive_mode=True)

        assert_refused(response, 400, "image_too_large", "image_url[0]")


def test_a_stream_is_lines_of_json_whose_texts_are_the_answer(server: RunningServer, number: int) -> None:
    response = post(server, prompt="hi", session_id=number, interactive_mode=True, stream=True)

    assert response.headers["content-type"].startswith("text/event-stream")
    assert b"data:" not in response.content
    assert response.content.endswith(b"}\n")
    pieces = lines_of(response)
    assert "".join(piece["text"] for piece in pieces) == DEFAULT_REPLY
    assert all(set(piece) == set(ZEROS) for piece in pieces)
    assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert [piece["tokens"] for piece in pieces] == sorted(piece["tokens"] for piece in pieces)
    assert pieces[-1]["tokens"] == NUM_REPLY_TOKENS
    assert {(piece["input_tokens"], piece["history_tokens"]) for piece in pieces} == {(len(asked(server)), 0)}
    assert turn(server, "again", number)["history_tokens"] == total(pieces[-1])


def test_warnings_are_in_the_last_line_of_a_stream(server: RunningServer) -> None:
    pieces = lines_of(post(server, prompt="hi", stream=True, odd=1))

    assert ["warnings" in piece for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert post(server, prompt="hi", odd=1).json()["warnings"] == ["odd: no API documents this field; it has no effect"]


class RunningTurn:
    """A stream whose first piece was read, and whose engine gives no more."""

    def __init__(self, response: requests.Response) -> None:
        self._response = response
        self._lines = response.iter_lines()
        self.first = json.loads(next(self._lines))

    def rest(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._lines]

    def close(self) -> None:
        self._response.close()


@contextlib.contextmanager
def running_turn(server: RunningServer, number: int, *, key: str = "none", hangs_after: int = 3) -> Iterator[RunningTurn]:
    body = {"prompt": "a long story", "session_id": number, "interactive_mode": True, "stream": True}
    server.backend.engine.hangs_after = hangs_after
    headers = {"Authorization": f"Bearer {key}"}
    with requests.post(server.url + PATH, json=body, headers=headers, stream=True, timeout=10) as response:
        turn = RunningTurn(response)
        server.backend.engine.hangs_after = None
        yield turn


def free_turn(server: RunningServer, number: int) -> dict[str, Any]:
    """A turn on a session whose last client has left; the server may not have noticed yet."""
    deadline_s = time.monotonic() + 5
    while (response := post(server, prompt="next", session_id=number, interactive_mode=True)).status_code == 409:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return dict(response.json())


def test_two_turns_at_once_on_one_session_are_refused(server: RunningServer, number: int) -> None:
    with running_turn(server, number):
        response = post(server, prompt="me too", session_id=number, interactive_mode=True)
        other = turn(server, "hi", next(_numbers))

    assert_refused(response, 409, "session_busy", "session_id")
    assert response.headers["retry-after"]
    assert other["finish_reason"] == "stop"


def test_cancelling_stops_the_turn_and_leaves_the_history_as_it_was(server: RunningServer, number: int) -> None:
    first = turn(server, "hi", number)
    with running_turn(server, number) as running:
        cancelled = post(server, session_id=number, cancel=True)
        rest = running.rest()

    assert cancelled.json() == ZEROS
    assert rest[-1]["finish_reason"] == "abort"
    assert rest[-1]["tokens"] == 3
    assert server.backend.activity.is_idle_within(1)
    assert turn(server, "again", number)["history_tokens"] == total(first)
    assert "a long story" not in str(server.backend.pipeline.turns[-1][0])


def test_a_turn_can_be_cancelled_while_its_picture_is_fetched(server: RunningServer, number: int) -> None:
    answers: list[requests.Response] = []
    body = {"prompt": "hi", "image_url": "https://example.org/slow.png", "session_id": number, "interactive_mode": True}
    thread = threading.Thread(target=lambda: answers.append(post(server, **body)))
    thread.start()
    assert server.backend.activity.has_begun_within(5)

    post(server, prompt="", session_id=number, cancel=True)
    thread.join(10)

    assert answers[0].json() == {**ZEROS, "finish_reason": "abort"}
    assert turn(server, "again", number)["history_tokens"] == 0


def test_cancelling_what_does_not_run_does_nothing(server: RunningServer, number: int) -> None:
    first = turn(server, "hi", number)

    for session_id in (number, next(_numbers)):
        assert post(server, prompt="x", session_id=session_id, cancel=True).json() == ZEROS

    assert turn(server, "again", number)["history_tokens"] == total(first)
    assert_refused(post(server, prompt="x", cancel=True), 400, "missing_required_parameter", "session_id")


def test_a_client_that_leaves_its_stream_leaves_the_history_as_it_was(server: RunningServer, number: int) -> None:
    first = turn(server, "hi", number)

    with running_turn(server, number) as running:
        running.close()

    assert server.backend.activity.was_left_within(5)
    assert free_turn(server, number)["history_tokens"] == total(first)


def test_a_client_that_leaves_before_its_answer_leaves_the_history_as_it_was(server: RunningServer, number: int) -> None:
    first = turn(server, "hi", number)
    server.backend.activity.__init__()  # type: ignore[misc]
    server.backend.engine.hangs_after = 0
    data = json.dumps({"prompt": "x", "session_id": number, "interactive_mode": True}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        assert server.backend.activity.has_begun_within(5)

    assert server.backend.activity.was_left_within(5)
    server.backend.engine.hangs_after = None
    assert free_turn(server, number)["history_tokens"] == total(first)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_dies_leaves_the_history_as_it_was(server: RunningServer, number: int, stream: bool) -> None:
    first = turn(server, "hi", number)
    server.backend.engine.fails_after = 3

    response = post(server, prompt="two", session_id=number, interactive_mode=True, stream=stream)

    if stream:
        last = lines_of(response)[-1]
        assert (response.status_code, last["finish_reason"], last["text"], last["tokens"]) == (200, "error", "", 3)
        assert last["error"]["code"] == "engine_unavailable"
    else:
        assert_refused(response, 503, "engine_unavailable", None)
    server.backend.engine.fails_after = None
    assert turn(server, "again", number)["history_tokens"] == total(first)


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_has_its_own_status(server: RunningServer, number: int, stream: bool) -> None:
    server.backend.engine.refusal = QueueFullError("64 requests wait already", retry_after_s=3)

    assert_refused(post(server, prompt="x", session_id=number, interactive_mode=True, stream=stream), 429, "queue_full", None)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_window_is_an_empty_answer_and_a_kept_session_stays_as_it_was(server: RunningServer, number: int, stream: bool) -> None:
    first = turn(server, "hi", number)

    response = post(server, prompt="x" * SESSION_LEN, session_id=number, interactive_mode=True, stream=stream)
    again = turn(server, "again", number)

    [answer] = lines_of(response)
    assert (response.status_code, answer["text"], answer["tokens"], answer["finish_reason"]) == (200, "", 0, "length")
    assert answer["history_tokens"] == again["history_tokens"] == total(first)
    assert answer["input_tokens"] > SESSION_LEN


def test_a_full_window_without_interactive_mode_ends_the_session(server: RunningServer, number: int) -> None:
    turn(server, "hi", number)

    answer = post(server, prompt="x" * SESSION_LEN, session_id=number).json()

    assert answer["finish_reason"] == "length"
    assert turn(server, "again", number)["history_tokens"] == 0


def test_no_number_is_ever_negative(server: RunningServer, number: int) -> None:
    """What LMDeploy answered to mixed-up session ids."""
    server.backend.engine.script = lambda prompt, params: [*b"a" * 40, EOS]
    for words in ("hi", "x" * SESSION_LEN, "", "y" * 400, "z"):
        for fields in ({"interactive_mode": True}, {"interactive_mode": True, "request_output_len": 1}):
            answer = post(server, prompt=words, session_id=number, **fields).json()
            assert min(answer["tokens"], answer["input_tokens"], answer["history_tokens"]) >= 0


INVALID: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": [{"role": "pope", "content": "x"}]}, "prompt[0].role"),
    ({"prompt": "x", "messages": "y"}, "messages"),
    ({"prompt": [{"role": "user", "content": "x"}], "image_url": PICTURE}, "image_url"),
    ({"prompt": "x", "image_url": 5}, "image_url"),
    ({"prompt": "x", "image_url": [5]}, "image_url[0]"),
    ({"prompt": "x", "session_id": "one"}, "session_id"),
    ({"prompt": "x", "request_output_len": -1}, "request_output_len"),
    ({"prompt": "x", "request_output_len": 0}, "request_output_len"),
    ({"prompt": "", "request_output_len": 0, "session_id": 1, "interactive_mode": True}, "request_output_len"),
    ({"prompt": "x", "temperature": 2.1}, "temperature"),
    ({"prompt": "x", "top_p": 0}, "top_p"),
    ({"prompt": "x", "top_k": -2}, "top_k"),
    ({"prompt": "x", "adapter_name": "lora"}, "adapter_name"),
    ({"prompt": "x", "spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
    ({"prompt": "x", "max_tokens": 5}, "max_tokens"),
    ({"prompt": "x", "n": 2}, "n"),
    ({"prompt": "x", "presence_penalty": 1.0}, "presence_penalty"),
    ({"prompt": "x", "tools": [{}]}, "tools"),
    ({"prompt": "x", "tool_choice": "required"}, "tool_choice"),
    ({"prompt": "x", "response_format": {"type": "json_object"}}, "response_format"),
    ({"prompt": "x", "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"prompt": "x", "num_beams": 2}, "num_beams"),
    ({"prompt": "x", "do_sample": False}, "do_sample"),
    ({"prompt": "x", "reasoning_effort": "low"}, "reasoning_effort"),
    ({"prompt": "x", "continue_final_message": True}, "continue_final_message"),
]


@pytest.mark.parametrize(("fields", "param"), INVALID, ids=[str(fields)[:60] for fields, _ in INVALID])
def test_a_bad_field_is_refused_with_its_path(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    response = post(server, **fields)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert response.json()["message"].startswith(param)
    assert not server.backend.engine.requests


def test_the_model_may_be_named_and_must_then_be_the_servers(server: RunningServer) -> None:
    assert post(server, prompt="hi", model=server.model).status_code == 200
    assert_refused(post(server, prompt="hi", model="other"), 404, "model_not_found", "model")


def test_a_stray_kwargs_field_is_tolerated(server: RunningServer) -> None:
    assert "warnings" not in post(server, prompt="hi", kwargs={"session_id": 3}, spaces_between_special_tokens=True).json()


def test_each_key_has_sessions_of_its_own() -> None:
    with running_server(fake_config(api_keys=("first", "second"))) as server:
        first = turn(server, "a secret", 1, key="first")

        assert turn(server, "hi", 1, key="second")["history_tokens"] == 0
        post(server, prompt="", session_id=1, request_output_len=0, key="second")
        with running_turn(server, 1, key="first") as running:
            assert post(server, session_id=1, cancel=True, key="second").json() == ZEROS
            assert turn(server, "hi", 1, key="second")["history_tokens"] == 0
            running.close()
        again = free_turn_of(server, "first")

        assert again["history_tokens"] == total(first)
        keys = [prompt.cache_keys[0] for prompt, _ in server.backend.engine.requests[-2:]]
        assert keys[0] != keys[1]


def free_turn_of(server: RunningServer, key: str) -> dict[str, Any]:
    deadline_s = time.monotonic() + 5
    while (response := post(server, prompt="next", session_id=1, interactive_mode=True, key=key)).status_code == 409:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return dict(response.json())


def test_the_longest_unused_sessions_end_beyond_the_limit() -> None:
    with running_server(fake_config(max_sessions=2)) as server:
        first = turn(server, "hi", 1)
        turn(server, "hi", 2)
        assert turn(server, "hi", 1)["history_tokens"] == total(first)
        turn(server, "hi", 3)

        assert turn(server, "hi", 2)["history_tokens"] == 0
        assert "vlm:sessions 2.0" in requests.get(f"{server.url}/metrics", timeout=10).text.splitlines()


def test_sessions_in_a_file_survive_a_restart(tmp_path: Path) -> None:
    config = fake_config(session_store=str(tmp_path / "sessions.sqlite3"))
    with running_server(config) as server:
        first = turn(server, "Describe it", 1, image_url=PICTURE)

    with running_server(config) as server:
        second = turn(server, "And now?", 1)
        messages, files = server.backend.pipeline.turns[-1]

    assert second["history_tokens"] == total(first)
    assert messages[-1]["content"] == "And now?"
    assert list(files.values()) == [PICTURE.encode()]


def test_servers_with_one_redis_share_their_sessions_one_turn_at_a_time() -> None:
    with (
        redis_server() as url,
        running_server(fake_config(session_store=url)) as here,
        running_server(fake_config(session_store=url)) as there,
    ):
        first = turn(here, "hi", 1)
        with running_turn(here, 1) as running:
            busy = post(there, prompt="x", session_id=1, interactive_mode=True)
            cancelled = post(there, session_id=1, cancel=True)
            second = turn(there, "two", 1)
            rest = running.rest()
        third = turn(here, "three", 1)

    assert_refused(busy, 409, "session_busy", "session_id")
    assert cancelled.json() == ZEROS
    assert rest[-1]["finish_reason"] == "abort"
    assert second["history_tokens"] == total(first)
    assert third["history_tokens"] == total(second)


def test_a_session_of_another_version_is_refused_for_good_until_it_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite3"
    with running_server(fake_config(session_store=str(path))) as server:
        turn(server, "hi", 1)
        with contextlib.closing(sqlite3.connect(path)) as file, file:
            file.execute("UPDATE records SET value = x'c1'")

        refusal = post(server, prompt="x", session_id=1, interactive_mode=True)
        ended = post(server, prompt="", session_id=1, interactive_mode=False, request_output_len=0)

        assert_refused(refusal, 409, "record_unreadable", "session_id")
        assert "retry-after" not in refusal.headers
        assert ended.json() == ZEROS
        assert turn(server, "again", 1)["history_tokens"] == 0


def test_a_store_that_fails_is_503_and_the_other_routes_go_on() -> None:
    backend = FakeBackend()

    @contextlib.asynccontextmanager
    async def broken(where: str) -> AsyncIterator[RecordStore]:
        yield Broken()  # type: ignore[misc]

    with serving(create_app(fake_config(), open_backend=backend.open, open_store=broken)) as url:
        for fields in ({"prompt": "hi"}, {"prompt": "", "request_output_len": 0}, {"cancel": True}):
            response = requests.post(url + PATH, json={"session_id": 1, **fields}, timeout=10)
            assert_refused(response, 503, "session_store_unavailable", None)
            assert response.headers["retry-after"]
        assert requests.post(url + PATH, json={"prompt": "hi"}, timeout=10).status_code == 200
        metrics = requests.get(f"{url}/metrics", timeout=10)
        assert metrics.status_code == 200
        assert "vlm:sessions " not in metrics.text


class Broken:
    """A store that is out of reach."""

    def __getattr__(self, name: str) -> Any:
        async def fail(*args: object, **options: object) -> None:
            raise StoreError("the session store failed: out of reach")

        return fail


def test_turns_and_sessions_are_counted(server: RunningServer, number: int) -> None:
    turn(server, "hi", number)
    with running_turn(server, number):
        lines = requests.get(f"{server.url}/metrics", timeout=10).text.splitlines()

    assert "vlm:session_turns_active 1.0" in lines
    [sessions] = [line for line in lines if line.startswith("vlm:sessions ")]
    assert float(sessions.split()[1]) >= 1


def test_the_openapi_document_describes_every_field_and_its_examples_work(server: RunningServer) -> None:
    document = requests.get(f"{server.url}/openapi.json", timeout=10).json()
    operation = document["paths"][PATH]["post"]

    for name in ("GenerateRequest", "InteractiveResponse"):
        properties = document["components"]["schemas"][name]["properties"]
        assert all(field.get("description") for field in properties.values()), name
    assert "409" in operation["responses"]
    assert "text/event-stream" in operation["responses"]["200"]["content"]
    for example in operation["requestBody"]["content"]["application/json"]["examples"].values():
        response = requests.post(server.url + PATH, json=example["value"], timeout=10)
        assert response.status_code == 200
        for line in response.text.splitlines():
            InteractiveResponse.model_validate_json(line)
