"""`/v1/responses` over a scripted engine: what is refused and by which name, what is kept and when, how streams end."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import requests

from engine.request import EngineDeadError, QueueFullError
from tests.contract.fake_engine import DEFAULT_REPLY, SESSION_LEN, FakeBackend
from tests.contract.running import MODEL, RunningServer, fake_config, running_server, serving
from tests.vlm_server.byte_tokenizer import EOS
from tests.vlm_server.test_fields import sampled_with
from tests.vlm_server.test_guided import accepts
from vision.image import MediaError
from vlm_server.app import create_app
from vlm_server.responses.schema import Response, ResponseItemList, ResponseStreamEvent
from vlm_server.sessions.opening import open_store
from vlm_server.sessions.store import Limits, RecordId, RecordStore, StoreError

PATH = "/v1/responses"
UNKNOWN = "resp_" + "0" * 32
URL = "https://example.org/a.png"
FUNCTION = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "integer"}}}}


def post(server: RunningServer, input: Any = "hi", **fields: Any) -> requests.Response:
    data = json.dumps({"input": input, **fields})
    return requests.post(server.url + PATH, data=data, headers={"content-type": "application/json"}, timeout=10)


def answered(server: RunningServer, input: Any = "hi", **fields: Any) -> dict[str, Any]:
    response = post(server, input, **fields)
    assert response.status_code == 200, response.text
    return dict(response.json())


def get(server: RunningServer, path: str, **query: Any) -> requests.Response:
    return requests.get(f"{server.url}{PATH}/{path}", params=query, timeout=10)


def events_of(response: requests.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]


def asked(server: RunningServer) -> str:
    token_ids = server.backend.engine.requests[-1][0].token_ids
    return bytes(token_id for token_id in token_ids if token_id < 256).decode()


def said(*parts: dict[str, Any], role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": list(parts)}]


def assert_refused(response: requests.Response, status: int, code: str, param: str | None) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), error
    assert param is None or error["message"].startswith((f"{param}: ", "the "))


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


PICTURE = {"type": "input_image", "image_url": URL}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"background": True}, "unsupported_parameter", "background"),
    ({"conversation": "conv_1"}, "unsupported_parameter", "conversation"),
    ({"prompt": {"id": "p"}}, "unsupported_parameter", "prompt"),
    ({"context_management": [{"type": "compaction"}]}, "unsupported_parameter", "context_management"),
    ({"prompt_cache_retention": "24h"}, "unsupported_parameter", "prompt_cache_retention"),
    ({"moderation": {"model": "m"}}, "unsupported_parameter", "moderation"),
    ({"service_tier": "flex"}, "invalid_value", "service_tier"),
    ({"truncation": "auto"}, "invalid_value", "truncation"),
    ({"text": {"verbosity": "low"}}, "invalid_value", "text.verbosity"),
    ({"text": {"format": {"type": "grammar"}}}, "invalid_value", "text.format"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "missing_required_parameter", "text.format.schema"),
    ({"reasoning": {"summary": "detailed"}}, "invalid_value", "reasoning.summary"),
    ({"reasoning": {"effort": "huge"}}, "invalid_value", "reasoning.effort"),
    ({"reasoning": {"generate_summary": "auto"}}, "unsupported_parameter", "reasoning.generate_summary"),
    ({"include": ["reasoning.encrypted_content"]}, "unsupported_parameter", "include"),
    ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    ({"stream_options": {"include_obfuscation": True}}, "unsupported_parameter", "stream_options.include_obfuscation"),
    ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
    ({"max_tokens": 5}, "unsupported_parameter", "max_tokens"),
    ({"messages": []}, "unsupported_parameter", "messages"),
    ({"n": 2}, "unsupported_parameter", "n"),
    ({"temperature": 3}, "invalid_value", "temperature"),
    ({"top_k": -2}, "invalid_value", "top_k"),
    ({"stop_token_ids": [10**6]}, "invalid_value", "stop_token_ids[0]"),
    ({"metadata": {"a" * 65: "b"}}, "invalid_value", "metadata"),
    ({"metadata": {"a": 1}}, "invalid_value", "metadata.a"),
    ({"user": "\ud800"}, "invalid_value", "user"),
    ({"tools": [{"type": "web_search"}]}, "unsupported_tool", "tools[0]"),
    ({"tools": [FUNCTION, {"type": "mcp", "server_label": "x"}]}, "unsupported_tool", "tools[1]"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "invalid_value", "tools[0].name"),
    ({"tools": [{**FUNCTION, "async": True}]}, "unsupported_parameter", "tools[0].async"),
    ({"tools": [FUNCTION], "tool_choice": {"type": "web_search"}}, "invalid_value", "tool_choice.type"),
    ({"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "see"}}, "invalid_value", "tool_choice"),
    ({"model": "other"}, "model_not_found", "model"),
    ({"input": None}, "invalid_value", "input"),
    ({"input": []}, "invalid_value", "input"),
    ({"input": ["x"]}, "invalid_value", "input[0]"),
    ({"input": "\ud800"}, "invalid_value", "input"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "unsupported_item", "input[0]"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "unsupported_item", "input[0]"),
    ({"input": [{"role": "tool", "content": "x"}]}, "invalid_value", "input[0].role"),
    ({"input": [{"role": "user"}]}, "missing_required_parameter", "input[0].content"),
    ({"input": said({"type": "input_file", "file_id": "f"})}, "unsupported_content_type", "input[0].content[0]"),
    ({"input": said({"type": "input_image"})}, "missing_required_parameter", "input[0].content[0].image_url"),
    ({"input": said({**PICTURE, "file_id": "f"})}, "invalid_value", "input[0].content[0].image_url"),
    ({"input": said({**PICTURE, "detail": "original"})}, "invalid_value", "input[0].content[0].detail"),
    ({"input": said(PICTURE, {**PICTURE, "image_url": "bad"})}, "image_decode_failed", "input[0].content[1].image_url"),
    ({"input": [{"role": "assistant", "content": "x", "phase": "commentary"}]}, "unsupported_parameter", "input[0].phase"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "missing_required_parameter", "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "", "output": "x"}]}, "invalid_value", "input[0].call_id"),
    (
        {"input": [{"type": "function_call_output", "call_id": "c", "output": [{**PICTURE, "image_url": "bad"}]}]},
        "image_decode_failed",
        "input[0].output[0].image_url",
    ),
    ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "unsupported_parameter", "input[0].encrypted_content"),
    ({"input": "x" * SESSION_LEN}, "context_length_exceeded", "input"),
    ({"previous_response_id": UNKNOWN}, "previous_response_not_found", "previous_response_id"),
    ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"$ref": "#/no"}}}}, "invalid_value", "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "name": "n", "schema": nested(99)}}}, "invalid_value", "text.format.schema"),
]


@pytest.mark.parametrize(("fields", "code", "param"), REFUSED, ids=[param for _, _, param in REFUSED])
def test_what_cannot_be_served_is_refused_under_the_clients_name(
    server: RunningServer, fields: dict[str, Any], code: str, param: str
) -> None:
    status = 404 if code in ("model_not_found", "previous_response_not_found") else 400

    assert_refused(post(server, **{"input": "hi", **fields}), status, code, param)


def test_input_is_needed(server: RunningServer) -> None:
    response = requests.post(server.url + PATH, json={"model": MODEL}, timeout=10)

    assert_refused(response, 400, "missing_required_parameter", "input")


def test_nulls_and_documented_defaults_ask_for_nothing(server: RunningServer) -> None:
    nulls = dict.fromkeys(
        ["background", "conversation", "prompt", "include", "tools", "tool_choice", "text", "reasoning", "metadata", "store"]
    )
    defaults = {
        "truncation": "disabled",
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "stream_options": {"include_obfuscation": False},
    }
    no_ops = {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "max_tool_calls": 3}

    response = answered(server, **(nulls | defaults | no_ops))

    assert "warnings" not in response
    assert {name: response[name] for name in no_ops} == no_ops
    Response.model_validate(response, strict=True)


def test_a_field_that_no_api_documents_gives_a_warning(server: RunningServer) -> None:
    response = answered(server, [{"role": "user", "content": "x", "mood": "good"}], surprise=1, reasoning={"effort": "low"})

    assert [warning.split(":")[0] for warning in response["warnings"]] == ["surprise", "input[0].mood", "reasoning.effort"]


def test_lmdeploys_fields_are_honoured(server: RunningServer) -> None:
    fields = {"top_k": 3, "min_p": 0.5, "repetition_penalty": 1.5, "seed": 7, "min_tokens": 2, "temperature": 0.25, "top_p": 0.5}

    answered(server, **fields, max_output_tokens=9, logit_bias={"65": 1.0})

    params = sampled_with(server)
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.max_tokens, params.logit_bias) == (9, {65: 1.0})
    assert answered(server, stop="This")["output_text"] == DEFAULT_REPLY.split("This")[0]


def test_a_schema_binds_the_answer(server: RunningServer) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}

    response = answered(server, text={"format": {"type": "json_schema", "name": "n", "schema": schema}})

    grammar = sampled_with(server).grammar
    assert grammar is not None
    assert accepts(grammar, '{"a": 1}')
    assert not accepts(grammar, '{"a": 3}')
    assert response["text"]["format"]["schema"] == schema


def test_instructions_are_for_one_response_alone(server: RunningServer) -> None:
    first = answered(server, "one", instructions="Be kind.")
    assert asked(server).startswith("system: Be kind.\nuser: one\n")

    second = answered(server, "two", previous_response_id=first["id"])

    assert asked(server) == f"user: one\nassistant: {DEFAULT_REPLY}\nuser: two\nassistant: "
    assert (second["previous_response_id"], second["instructions"]) == (first["id"], None)


def test_earlier_pictures_are_seen_again_and_named_by_their_response(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    first = answered(server, said(PICTURE))

    again = answered(server, "and?", previous_response_id=first["id"])

    assert len(server.backend.engine.requests[-1][0].images) == 1
    assert again["usage"]["input_tokens_details"]["image_tokens"] == 4
    monkeypatch.setattr(server.backend.pipeline, "_load", _fails)
    assert_refused(post(server, "and?", previous_response_id=first["id"]), 400, "image_fetch_failed", "previous_response_id")


async def _fails(url: str, param: str, *rest: object) -> None:
    raise MediaError("image_fetch_failed", "gone", param=param)


def test_an_item_that_comes_twice_is_refused(server: RunningServer) -> None:
    first = answered(server, [{"role": "user", "content": "one", "id": "a"}])
    user = {"role": "user", "content": "two"}

    for again in ({**user, "id": "a"}, first["output"][0]):
        assert_refused(post(server, [user, again], previous_response_id=first["id"]), 400, "duplicate_item", "input[1].id")
    assert_refused(post(server, [{**user, "id": "b"}, {**user, "id": "b"}]), 400, "duplicate_item", "input[1].id")
    answered(server, [user, first["output"][0], user])


def test_what_is_not_stored_cannot_be_found(server: RunningServer) -> None:
    response = answered(server, store=False)

    assert response["store"] is False
    assert_refused(get(server, response["id"]), 404, "response_not_found", "response_id")


def test_a_response_is_retrieved_as_it_was_sent(server: RunningServer) -> None:
    response = answered(server, metadata={"a": "你"}, tools=[{**FUNCTION, "parameters": {"properties": {"a": {"maximum": 10**30}}}}])

    assert get(server, response["id"]).json() == response
    assert get(server, response["id"], stream="false", include_obfuscation="false").json() == response
    assert_refused(get(server, response["id"], stream="true"), 400, "unsupported_parameter", "stream")
    assert_refused(get(server, response["id"], starting_after="3"), 400, "unsupported_parameter", "starting_after")
    assert_refused(get(server, response["id"], **{"include[]": "x"}), 400, "unsupported_parameter", "include[]")
    assert_refused(get(server, "resp_x"), 404, "response_not_found", "response_id")


def test_a_cancel_says_why_there_is_nothing_to_cancel(server: RunningServer) -> None:
    response = answered(server)

    for response_id, status, code in ((response["id"], 400, "not_cancellable"), (UNKNOWN, 404, "response_not_found")):
        assert_refused(requests.post(f"{server.url}{PATH}/{response_id}/cancel", timeout=10), status, code, "response_id")


def test_input_items_come_in_pages(server: RunningServer) -> None:
    first = answered(
        server, [{"role": "user", "content": "a", "id": "my-id"}, *said({"type": "output_text", "text": "b"}, role="assistant")]
    )
    second = answered(server, said(PICTURE), previous_response_id=first["id"])
    path = f"{second['id']}/input_items"

    whole = get(server, path, order="asc").json()
    pages = [get(server, path, order="asc", limit=3).json()]
    pages.append(get(server, path, order="asc", limit=3, after=pages[0]["last_id"]).json())

    assert [item["role"] for item in whole["data"]] == ["user", "assistant", "assistant", "user"]
    assert whole["data"][0]["id"] == whole["first_id"] == "my-id"
    assert whole["data"][2] == first["output"][0]
    assert whole["data"][3]["content"] == [{"type": "input_image", "detail": "auto", "image_url": URL, "file_id": None}]
    assert [item for page in pages for item in page["data"]] == whole["data"]
    assert [page["has_more"] for page in pages] == [True, False]
    assert get(server, path).json()["data"] == whole["data"][::-1]
    assert_refused(get(server, path, after="no"), 400, "invalid_value", "after")
    assert_refused(get(server, path, limit=0), 400, "invalid_value", "limit")
    assert get(server, path, after=whole["first_id"]).json() == {
        "object": "list",
        "data": [],
        "first_id": "",
        "last_id": "",
        "has_more": False,
    }
    ResponseItemList.model_validate(whole)


def test_a_stream_is_kept_before_its_last_event(server: RunningServer) -> None:
    response = post(server, stream=True)

    assert response.headers["content-type"].startswith("text/event-stream")
    assert "[DONE]" not in response.text
    events = events_of(response)
    assert [line.removeprefix("event: ") for line in response.text.splitlines() if line.startswith("event: ")] == [
        event["type"] for event in events
    ]
    for event in events:
        ResponseStreamEvent.model_validate(event)
    assert get(server, events[-1]["response"]["id"]).json() == events[-1]["response"]
    assert get(server, events_of(post(server, stream=True, store=False))[-1]["response"]["id"]).status_code == 404


def test_an_engine_that_dies_fails_the_stream_and_nothing_is_kept(server: RunningServer) -> None:
    server.backend.engine.fails_after = 3

    events = events_of(post(server, stream=True))

    failed = events[-1]
    assert failed["type"] == "response.failed"
    assert failed["response"]["error"]["code"] == "server_error"
    assert failed["response"]["output"][0]["content"][0]["text"] == DEFAULT_REPLY[:3]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert get(server, failed["response"]["id"]).status_code == 404
    Response.model_validate(failed["response"])


def test_what_fails_before_the_answer_has_its_own_status(server: RunningServer) -> None:
    for refusal, status in ((EngineDeadError("down"), 503), (QueueFullError(3), 429)):
        server.backend.engine.refusal = refusal
        for streams in (False, True):
            assert post(server, stream=streams).status_code == status


@pytest.mark.parametrize("streams", [False, True])
def test_the_response_of_a_client_that_left_is_not_kept(server: RunningServer, streams: bool) -> None:
    server.backend.engine.hangs_after = 3
    data = json.dumps({"input": "hi", "stream": streams}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        received = b""
        while streams and b"in_progress" not in received:
            received += connection.recv(4096)
        assert server.backend.activity.has_begun_within(5)

    assert server.backend.activity.was_left_within(5)
    if streams:
        event = next(line for line in received.split(b"\n") if line.startswith(b"data: "))
        assert get(server, json.loads(event[6:])["response"]["id"]).status_code == 404


class FailingStore:
    """A store that reads and does not write."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def put(self, *args: Any, **options: Any) -> None:
        raise StoreError("the session store failed: disk full")


@pytest.fixture(scope="module")
def server_that_cannot_store() -> Iterator[RunningServer]:
    @contextlib.asynccontextmanager
    async def opened(where: str) -> AsyncIterator[Any]:
        async with open_store(where) as store:
            yield FailingStore(store)

    backend = FakeBackend()
    with serving(create_app(fake_config(), open_backend=backend.open, open_store=opened)) as url:
        yield RunningServer(url, MODEL, backend)


def test_a_store_that_fails_is_told_of_in_place_of_an_answer(server_that_cannot_store: RunningServer) -> None:
    server = server_that_cannot_store

    assert_refused(post(server), 503, "session_store_unavailable", None)
    events = events_of(post(server, stream=True))
    failed = events[-1]
    assert (failed["type"], failed["response"]["error"]["code"]) == ("response.failed", "server_error")
    assert "disk full" in failed["response"]["error"]["message"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert "response.output_item.done" not in {event["type"] for event in events}
    assert [(item["status"], item["content"][0]["text"]) for item in failed["response"]["output"]] == [("incomplete", DEFAULT_REPLY)]
    assert failed["response"]["usage"]["output_tokens"] == len(DEFAULT_REPLY.encode()) + 1, "the end token is the last"
    assert answered(server, store=False)["output_text"] == DEFAULT_REPLY


def test_what_another_version_kept_is_refused_for_good() -> None:
    stores: list[RecordStore] = []

    @contextlib.asynccontextmanager
    async def opened(where: str) -> AsyncIterator[RecordStore]:
        async with open_store(where) as store:
            stores.append(store)
            yield store

    value = b'{"response": {"output": []}, "items": [{"type": "unheard of"}]}'
    with serving(create_app(fake_config(), open_backend=FakeBackend().open, open_store=opened)) as url:
        assert requests.get(f"{url}/health", timeout=10).status_code == 200  # from here on the store is open
        asyncio.run(stores[0].put(RecordId("responses", "", UNKNOWN), value, parts={}, limits=Limits(60, 10)))

        response = requests.post(url + PATH, json={"input": "x", "previous_response_id": UNKNOWN}, timeout=10)
        asyncio.run(stores[0].put(RecordId("responses", "", UNKNOWN), b'{"response": 5}', parts={}, limits=Limits(60, 10)))
        continued = requests.post(url + PATH, json={"input": "x", "previous_response_id": UNKNOWN}, timeout=10)
        retrieved = requests.get(f"{url}{PATH}/{UNKNOWN}", timeout=10)

    for refusal, param in ((response, "previous_response_id"), (continued, "previous_response_id"), (retrieved, "response_id")):
        assert_refused(refusal, 409, "record_unreadable", param)
        assert "retry-after" not in refusal.headers, "it stays so"


def test_a_conversation_that_is_too_large_to_keep_is_refused_before_it_is_answered() -> None:
    with running_server(fake_config(max_session_bytes=400)) as server:
        large = said({"type": "input_image", "image_url": "data:image/png;base64," + "A" * 300})
        first = answered(server, "x" * 20)

        assert_refused(post(server, large), 400, "conversation_too_large", "input")
        assert_refused(post(server, "y" * 20, previous_response_id=first["id"]), 400, "conversation_too_large", "input")
        assert len(server.backend.engine.requests) == 1
        assert answered(server, large, store=False)["status"] == "completed"


def test_the_limits_of_what_is_kept_are_the_servers() -> None:
    with running_server(fake_config(max_responses=1)) as server:
        ids = [answered(server)["id"] for _ in range(2)]

        assert [get(server, response_id).status_code for response_id in ids] == [404, 200]


def test_calls_and_reasoning_are_items() -> None:
    call = '<tool_call>\n{"name": "look", "arguments": {"at": 1}}\n</tool_call>'
    with running_server(fake_config(reasoning_parser="qwen3")) as server:
        server.backend.engine.script = lambda prompt, params: [*f"<think>\nHm.\n</think>\n\nI look.\n{call}\n{call}".encode(), EOS]

        response = answered(server, tools=[FUNCTION])

    assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call", "function_call"]
    thought, message, first, second = response["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert message["content"][0]["text"] == response["output_text"] == "I look."
    assert (first["name"], first["arguments"], first["status"]) == ("look", '{"at": 1}', "completed")
    assert first["call_id"] != second["call_id"]
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert response["status"] == "completed"


def test_a_call_that_is_cut_is_incomplete(server: RunningServer) -> None:
    server.backend.engine.script = lambda prompt, params: [*b'<tool_call>\n{"name": "look", "arguments": {"at', EOS]

    response = answered(server, tools=[FUNCTION], max_output_tokens=46)

    [call] = response["output"]
    assert (response["status"], call["status"]) == ("incomplete", "incomplete")
    assert call["arguments"] == '{"at'
