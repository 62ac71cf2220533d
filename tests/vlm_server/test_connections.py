"""Clients that hold a connection without getting on: a raw socket on one side, uvicorn with our limits on the other."""

import contextlib
import gc
import json
import socket
import time
from collections.abc import Iterator

import pytest
import requests
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tests.contract.running import RunningServer, fake_config, running_server, serving
from vlm_server.config import ConnectionLimits
from vlm_server.connections import MAX_HEAD_BYTES, MAX_PIPELINED

SOON = ConnectionLimits(head_s=0.2, body_pause_s=0.2, body_s=0.5, send_s=0.3)
LONG_S = 10.0  # no test waits as long unless it fails
PATIENT = ConnectionLimits(head_s=60.0, body_pause_s=60.0, body_s=60.0, send_s=60.0, keep_alive_s=0.3)
MAX_BODY_BYTES = 1 << 19
CHUNKED = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningServer]:
    with running_server(connections=SOON) as server:
        yield server


@pytest.fixture
def server(shared: RunningServer) -> RunningServer:
    shared.backend.reset()
    return shared


@pytest.fixture
def connection(server: RunningServer) -> Iterator[socket.socket]:
    with connected(server) as client:
        yield client


@pytest.fixture(scope="module")
def patient() -> Iterator[RunningServer]:
    """A server that waits longer than these tests, save for the next request."""
    with running_server(fake_config(max_body_bytes=MAX_BODY_BYTES), connections=PATIENT) as server:
        yield server


@pytest.fixture
def patient_connection(patient: RunningServer) -> Iterator[socket.socket]:
    with connected(patient) as client:
        yield client


@contextlib.contextmanager
def connected(server: RunningServer) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(LONG_S)
        client.connect((host, int(port)))
        yield client


def is_cut(connection: socket.socket) -> bool:
    """Whether the server ends the connection without an answer."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def answer_on(connection: socket.socket) -> bytes:
    """One answer of stated length, to its end."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(1)
    length = next(int(line[15:]) for line in received.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    while length:
        received += (piece := connection.recv(length))
        assert piece
        length -= len(piece)
    return received


def iter_bytes(connection: socket.socket) -> Iterator[int]:
    """All that comes until the server ends the connection, in order or cut."""
    with contextlib.suppress(ConnectionError):
        while received := connection.recv(65536):
            yield from received


def head(length: int) -> bytes:
    return f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode()


def chat(server: RunningServer, **fields: object) -> bytes:
    return json.dumps({"model": server.model, "messages": [{"role": "user", "content": "hi"}], **fields}).encode()


@pytest.mark.parametrize("begun", [b"", b"POST /v1/chat", b"GET / HTTP/1.1\r\nHost: a\r\nX-Slow: "])
def test_a_connection_whose_head_does_not_come_is_cut(connection: socket.socket, begun: bytes) -> None:
    connection.sendall(begun)

    assert is_cut(connection)


def test_a_head_that_drips_is_cut_too(connection: socket.socket) -> None:
    started_s = time.monotonic()
    connection.settimeout(0.02)

    while time.monotonic() - started_s < LONG_S:
        try:
            connection.sendall(b"G" if time.monotonic() - started_s < 0.01 else b"E")
            if connection.recv(1) == b"":
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break

    assert time.monotonic() - started_s < LONG_S


@pytest.mark.parametrize("begun", [b"GET / HTTP/1.1\r\nHost: a\r\n", CHUNKED + b"2\r\n{}\r\n0\r\n"])
def test_a_head_and_trailers_without_end_are_cut(patient_connection: socket.socket, begun: bytes) -> None:
    connection = patient_connection
    connection.sendall(begun)
    num_sent = 0

    while num_sent < 10 * MAX_HEAD_BYTES:
        try:
            connection.sendall(f"X-{num_sent}: ".encode() + b"a" * 1000 + b"\r\n")
        except ConnectionError:
            break
        num_sent += 1000

    assert is_cut(connection)


def test_requests_without_end_are_cut(patient_connection: socket.socket) -> None:
    """Before any of them has its answer."""
    num_sent = 20 * MAX_PIPELINED
    with contextlib.suppress(ConnectionError):
        patient_connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n" * num_sent)

    assert bytes(iter_bytes(patient_connection)).count(b"HTTP/1.1 200") < num_sent


def test_requests_that_are_sent_ahead_have_their_answers(patient_connection: socket.socket) -> None:
    patient_connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n" * MAX_PIPELINED)

    assert [answer_on(patient_connection)[:12] for _ in range(MAX_PIPELINED)] == [b"HTTP/1.1 200"] * MAX_PIPELINED


def test_cookies_are_never_read() -> None:
    """FastAPI reads them for each request; some versions of Python take seconds for a few kilobytes of quotes."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse([name.decode() for name, _ in scope["headers"]])(scope, receive, send)

    with serving(app) as url:
        names = requests.get(url, headers={"COOKIE": "a=1", "X-Other": "b"}, timeout=LONG_S).json()

    assert "x-other" in names
    assert "cookie" not in names


def test_a_large_body_is_no_head_without_end(patient_connection: socket.socket) -> None:
    piece = b"4000\r\n" + bytes(1 << 14) + b"\r\n"

    patient_connection.sendall(CHUNKED + piece * (4 * MAX_HEAD_BYTES >> 14) + b"0\r\nX-Sum: 1\r\n\r\n")

    assert answer_on(patient_connection).startswith(b"HTTP/1.1 400")


def test_a_body_that_stops_coming_is_cut(server: RunningServer, connection: socket.socket) -> None:
    connection.sendall(head(1000) + b'{"model": ')

    assert is_cut(connection)
    assert server.backend.engine.requests == []


def test_a_body_that_drips_is_cut_at_the_limit_for_all_of_it(server: RunningServer, connection: socket.socket) -> None:
    body = chat(server)
    connection.sendall(head(len(body) + 10_000))
    connection.settimeout(0.05)
    started_s = time.monotonic()

    while time.monotonic() - started_s < LONG_S:
        try:
            connection.sendall(b" ")
            if connection.recv(1) == b"":
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break

    assert SOON.body_s - 0.1 < time.monotonic() - started_s < LONG_S


def test_a_client_that_stops_reading_loses_its_connection_and_its_answer(server: RunningServer, connection: socket.socket) -> None:
    """Many choices: more than the kernel's buffers take of an answer that goes on and on."""
    body = chat(server, stream=True, n=128, ignore_eos=True, logprobs=True, top_logprobs=2)
    connection.sendall(head(len(body)) + body)

    assert server.backend.activity.has_begun_within(LONG_S)
    assert server.backend.activity.was_left_within(LONG_S)


@pytest.mark.parametrize("num_sent", [1, 2, 3])
def test_a_client_that_leaves_ends_all_that_it_asked_for(server: RunningServer, connection: socket.socket, num_sent: int) -> None:
    """Also where it sent further requests before it had its answer."""
    server.backend.engine.hangs_after = 1
    body = chat(server)
    connection.sendall((head(len(body)) + body) * num_sent)
    assert server.backend.activity.has_begun_within(LONG_S)

    connection.close()

    assert server.backend.activity.was_left_within(LONG_S)
    assert server.backend.activity.is_idle_within(LONG_S)


def test_an_answer_that_takes_long_is_no_idle_connection(server: RunningServer, connection: socket.socket) -> None:
    server.backend.engine.hangs_after = 1
    body = chat(server)
    connection.sendall(head(len(body)) + body)
    connection.settimeout(3 * SOON.head_s)

    with pytest.raises(TimeoutError):
        connection.recv(1)

    assert len(server.backend.activity) == 1


def test_who_is_refused_while_it_sends_gets_the_answer(patient_connection: socket.socket) -> None:
    """A proxy sends on, and may lose what it was told when the connection is cut meanwhile."""
    connection = patient_connection
    body = bytes(8 << 20)
    connection.sendall(f"POST /v1/nothing HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode())
    connection.sendall(body[:1000])
    assert connection.recv(12) == b"HTTP/1.1 413"

    connection.sendall(body[1000:])

    assert b'"error"' in bytes(iter_bytes(connection))


def test_who_is_refused_after_it_was_told_to_go_on_gets_the_answer(patient_connection: socket.socket) -> None:
    """As curl sends what it cannot say the length of."""
    connection = patient_connection
    connection.sendall(CHUNKED.removesuffix(b"\r\n") + b"Expect: 100-continue\r\nConnection: close\r\n\r\n")
    assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
    piece = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    connection.sendall(piece)
    assert connection.recv(12) == b"HTTP/1.1 413"

    connection.sendall(piece * 8 + b"0\r\n\r\n")

    assert b'"error"' in bytes(iter_bytes(connection))


def test_who_waits_to_be_told_to_go_on_is_not_waited_for(patient_connection: socket.socket) -> None:
    head = b"POST /v1/nothing HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    patient_connection.sendall(head)

    assert b"HTTP/1.1 404" in bytes(iter_bytes(patient_connection)), "it ends before the limit of this connection"


def test_who_is_refused_and_stops_sending_is_cut(connection: socket.socket) -> None:
    connection.sendall(b"POST /v1/nothing HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nConnection: close\r\n\r\n1")

    assert b"HTTP/1.1 404" in bytes(iter_bytes(connection))


def test_a_refused_body_that_ends_later_leaves_no_connection_open(patient_connection: socket.socket) -> None:
    """As every other idle connection, it waits for a next request up to the limit."""
    patient_connection.sendall(b"POST /v1/nothing HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n12345")
    assert answer_on(patient_connection).startswith(b"HTTP/1.1 404")

    patient_connection.sendall(b"6789")

    assert is_cut(patient_connection)


def test_a_line_that_begins_no_request_leaves_no_connection_open(patient_connection: socket.socket) -> None:
    patient_connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n")
    assert answer_on(patient_connection).startswith(b"HTTP/1.1 200")

    patient_connection.sendall(b"\r\n")

    assert is_cut(patient_connection)


def test_a_connection_that_ended_waits_for_no_collection(patient: RunningServer) -> None:
    def num_connections() -> int:
        return sum(issubclass(type(each), HttpToolsProtocol) for each in gc.get_objects())

    gc.collect()
    before = num_connections()
    gc.disable()
    try:
        with connected(patient) as connection:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert b"HTTP/1.1 200" in bytes(iter_bytes(connection))
        deadline_s = time.monotonic() + LONG_S
        while num_connections() > before:
            assert time.monotonic() < deadline_s
    finally:
        gc.enable()


def test_a_connection_is_used_again_within_its_limits(server: RunningServer) -> None:
    with requests.Session() as session:
        answers = [session.get(f"{server.url}/v1/models", timeout=LONG_S) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200] * 3


@pytest.mark.parametrize("name", ["head_s", "body_pause_s", "body_s", "keep_alive_s", "send_s"])
def test_a_limit_is_above_zero(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ConnectionLimits(**{name: 0})
