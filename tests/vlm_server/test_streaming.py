"""Streams and their ends: what is on the wire, clients that leave, engines that fail."""

import json
import socket
from typing import Any

import pytest
import requests

from engine.request import EngineDeadError, QueueFullError
from tests.contract.fake_engine import DEFAULT_REPLY
from tests.contract.running import RunningServer, fake_config, running_server
from tests.vlm_server.byte_tokenizer import EOS

HELLO = [{"role": "user", "content": "hi"}]


def body(server: RunningServer, **fields: Any) -> dict[str, Any]:
    return {"model": server.model, "messages": HELLO, **fields}


def post(server: RunningServer, **fields: Any) -> requests.Response:
    return requests.post(f"{server.url}/v1/chat/completions", json=body(server, **fields), timeout=10)


def events_of(response: requests.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


def leave_after(server: RunningServer, fields: dict[str, Any], *, reads: bool) -> None:
    """Sends a request, waits for the first byte of the answer if `reads`, and closes the connection."""
    data = json.dumps(body(server, **fields)).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        if reads:
            assert connection.recv(1)
        else:
            assert server.backend.activity.has_begun_within(5)


def test_lines_end_with_line_feeds_and_every_line_is_data(server: RunningServer) -> None:
    response = post(server, stream=True)

    assert response.headers["content-type"].startswith("text/event-stream")
    assert b"\r" not in response.content
    lines = [line for line in response.content.split(b"\n") if line]
    assert all(line.startswith(b"data: ") for line in lines)
    assert lines[-1] == b"data: [DONE]"


def test_every_chunk_writes_its_nulls(server: RunningServer) -> None:
    events = events_of(post(server, stream=True))

    for event in events[:-1]:
        assert event["choices"][0]["finish_reason"] is None
        assert event["choices"][0]["logprobs"] is None
        assert event["usage"] is None
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("group", [1, 2, 3, 7])
def test_no_character_is_cut_however_the_tokens_come(server: RunningServer, group: int) -> None:
    server.backend.engine.group = group

    pieces = [event["choices"][0]["delta"]["content"] for event in events_of(post(server, stream=True))]

    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == DEFAULT_REPLY


def test_a_step_of_several_tokens_is_one_chunk(server: RunningServer) -> None:
    server.backend.engine.script = lambda prompt, params: [*b"abcdef", EOS]
    server.backend.engine.group = 7

    events = events_of(post(server, stream=True))

    assert len(events) == 2  # the role, then everything


def test_a_stop_string_ends_the_engines_work_at_once(server: RunningServer) -> None:
    server.backend.engine.script = lambda prompt, params: [*b"one STOP two", EOS]
    server.backend.engine.hangs_after = len(b"one STOP")

    events = events_of(post(server, stop=["STOP"], stream=True))

    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == "one "
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert server.backend.activity.was_left_within(1)


@pytest.mark.parametrize("fields", [{"stream": True}, {"stream": True, "n": 3}])
def test_a_client_that_leaves_its_stream_ends_the_generation(server: RunningServer, fields: dict[str, Any]) -> None:
    server.backend.engine.hangs_after = 3

    leave_after(server, fields, reads=True)

    assert server.backend.activity.was_left_within(1)


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"stream": True}, {"stream": True, "n": 3}])
def test_a_client_that_leaves_before_the_first_token_ends_the_generation(server: RunningServer, fields: dict[str, Any]) -> None:
    server.backend.engine.hangs_after = 0

    leave_after(server, fields, reads=False)

    assert server.backend.activity.was_left_within(1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_picture_is_loaded_ends_the_loading(server: RunningServer, stream: bool) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "http://example.org/slow.png"}}]

    leave_after(server, {"messages": [{"role": "user", "content": parts}], "stream": stream}, reads=False)

    assert server.backend.activity.was_left_within(1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_429_with_retry_after(server: RunningServer, stream: bool) -> None:
    server.backend.engine.refusal = QueueFullError("64 requests wait already", retry_after_s=3)

    response = post(server, stream=stream)

    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert response.json()["error"]["code"] == "queue_full"


@pytest.mark.parametrize("stream", [False, True])
def test_a_dead_engine_is_503_with_retry_after(server: RunningServer, stream: bool) -> None:
    server.backend.engine.refusal = EngineDeadError("the engine is restarting")

    response = post(server, stream=stream)

    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == "engine_unavailable"


def test_an_engine_that_dies_while_streaming_ends_the_stream_with_an_error_event(server: RunningServer) -> None:
    server.backend.engine.fails_after = 3

    response = post(server, stream=True)

    lines = [line for line in response.text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    error = json.loads(lines[-2][6:])
    assert error["error"]["code"] == "engine_unavailable"
    assert error["code"] == 503


def test_one_dying_choice_of_several_ends_the_others(server: RunningServer) -> None:
    server.backend.engine.fails_after = 3

    response = post(server, n=4)

    assert response.status_code == 503
    assert server.backend.activity.is_idle_within(1)


def test_an_unexpected_error_is_a_500_that_tells_nothing(server: RunningServer) -> None:
    server.backend.engine.script = lambda prompt, params: _raise(RuntimeError("a secret path"))

    response = post(server)

    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"]


def _raise(error: Exception) -> Any:
    raise error


def test_comment_pings_come_only_when_asked_for() -> None:
    with running_server(fake_config(sse_ping_s=0.05)) as server:
        server.backend.engine.hangs_after = 1
        with requests.post(f"{server.url}/v1/chat/completions", json=body(server, stream=True), stream=True, timeout=10) as response:
            lines = response.iter_lines(delimiter=b"\n")
            assert any(line.startswith(b":") for line in lines)


def test_an_answer_may_be_empty(server: RunningServer) -> None:
    server.backend.engine.script = lambda prompt, params: [EOS]

    assert post(server).json()["choices"][0]["message"]["content"] == ""
