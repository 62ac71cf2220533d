"""Bytes of request bodies and files in memory: counted as they arrive, given back with the request, and not all for one client."""

import asyncio
import base64
import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from starlette.responses import Response
from starlette.types import ASGIApp, Message

from tests.contract.running import RunningServer, fake_config, running_server
from tests.vision.pictures import png
from tests.vlm_server.files_client import Client
from vision.config import VisionConfig
from vision.media_budgets import FREE_BYTES, MediaBudgets, hold_bytes
from vlm_server.body_budget import PIECE_BYTES, HoldsMedia, network_of

CHAT = "/v1/chat/completions"
LIMIT = 400_000
SHARE = 300_000


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running_server(fake_config(vision=VisionConfig(max_media_bytes_in_flight=LIMIT, budget_wait_s=0.0))) as server:
        yield server


def body_of(num_bytes: int, **fields: object) -> bytes:
    """A chat of so many bytes."""
    body = {"model": "org/tiny-vlm", "messages": [{"role": "user", "content": "hi"}], "user": "", **fields}
    missing = num_bytes - len(json.dumps(body))
    return json.dumps(body | {"user": "x" * max(0, missing)}).encode()


def post(server: RunningServer, data: bytes, **headers: str) -> requests.Response:
    return requests.post(server.url + CHAT, data=data, headers={"content-type": "application/json", **headers}, timeout=10)


def metric(server: RunningServer, name: str, *, budget: str = "media_bytes", **headers: str) -> float:
    lines = requests.get(server.url + "/metrics", headers=headers, timeout=10).text.splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f'vlm:{name}{{budget="{budget}"}}'))


def wait_for_used(server: RunningServer, num_bytes: int, **headers: str) -> float:
    """Seconds until exactly so many bytes are in flight; fails after 5."""
    began_s = time.monotonic()
    while metric(server, "budget_used", **headers) != num_bytes:
        assert time.monotonic() < began_s + 5, metric(server, "budget_used", **headers)
    return time.monotonic() - began_s


@contextlib.contextmanager
def unfinished(server: RunningServer, num_bytes: int, **headers: str) -> Iterator[None]:
    """A body of which so many bytes are there, and that says it will be long."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    connection.putrequest("POST", CHAT)
    for name, value in {"content-type": "application/json", "content-length": "100000000", **headers}.items():
        connection.putheader(name, value)
    connection.endheaders(body_of(num_bytes))
    try:
        wait_for_used(server, num_bytes, **headers)
        yield
    finally:
        connection.close()


def test_a_body_counts_as_it_arrives_and_no_longer_when_its_client_left(server: RunningServer) -> None:
    with unfinished(server, 250_000):
        refused = post(server, body_of(100_000))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_busy")
        assert int(refused.headers["retry-after"]) >= 1
        assert "--max-media-bytes-in-flight" in refused.json()["error"]["message"]
        assert post(server, body_of(50_000)).status_code == 200, "short ones are buffered by their connection anyway"
        assert metric(server, "budget_refusals_total") == 1

    assert wait_for_used(server, 0) < 1.0
    assert post(server, body_of(100_000)).status_code == 200
    assert wait_for_used(server, 0) < 1.0


def test_one_key_leaves_room_for_others() -> None:
    alice, bob = {"x-api-key": "alice"}, {"x-api-key": "bob"}
    config = fake_config(api_keys=("alice", "bob"), vision=VisionConfig(max_media_bytes_in_flight=LIMIT, budget_wait_s=0.0))
    with running_server(config) as server, unfinished(server, SHARE, **alice):
        assert post(server, body_of(80_000), **alice).status_code == 503
        assert post(server, body_of(80_000), **bob).status_code == 200
        assert post(server, body_of(80_000)).status_code == 401


def test_a_body_counts_while_its_answer_is_written(server: RunningServer) -> None:
    server.backend.engine.hangs_after = 3
    data = body_of(100_000, stream=True)
    with requests.post(server.url + CHAT, data=data, headers={"content-type": "application/json"}, stream=True, timeout=10) as stream:
        lines = stream.iter_lines()  # which would close the connection when it is dropped
        next(lines)
        assert metric(server, "budget_used") == len(data)

    assert wait_for_used(server, 0) < 1.0


def test_whatever_becomes_of_a_request_its_bytes_are_given_back(server: RunningServer) -> None:
    picture = {"type": "image_url", "image_url": {"url": "http://bad.example/"}}
    bodies = {
        400: body_of(100_000, messages=[{"role": "user", "content": [picture]}]),
        404: body_of(100_000, model="other"),
        200: body_of(100_000, n=3),
    }
    for status, data in bodies.items():
        assert post(server, data).status_code == status
        assert wait_for_used(server, 0) < 1.0
    assert post(server, b"{" * 100_000).status_code == 400
    server.backend.engine.fails_after = 1
    assert post(server, body_of(100_000)).status_code == 503

    assert wait_for_used(server, 0) < 1.0


def test_an_owner_of_an_ipv6_network_is_one_owner() -> None:
    assert network_of("2001:db8:1:2:3:4:5:6") == network_of("2001:db8:1:2::1%eth0") == "2001:db8:1:2::/64"
    assert network_of("2001:db8:1:3::1") != network_of("2001:db8:1:2::1")
    assert network_of("192.0.2.1") == "192.0.2.1"
    assert network_of("unknown") == "unknown"


def test_uploads_and_files_that_messages_name_count_too(server: RunningServer) -> None:
    client = Client(server)
    large = png() + bytes(150_000)
    file_id = client.upload(large).json()["id"]
    assert wait_for_used(server, 0) < 1.0

    picture = {"type": "image_url", "image_url": {"file_id": file_id}}
    with unfinished(server, 200_000):
        uploaded = client.upload(large)
        named = post(server, body_of(1000, messages=[{"role": "user", "content": [picture]}]))
    assert [(answer.status_code, answer.json()["error"]["code"]) for answer in (uploaded, named)] == [(503, "server_busy")] * 2
    assert wait_for_used(server, 0) < 1.0
    assert post(server, body_of(1000, messages=[{"role": "user", "content": [picture]}])).status_code == 200
    assert wait_for_used(server, 0) < 1.0


def test_what_is_kept_of_a_session_counts_before_it_is_read_and_while_its_turn_runs(server: RunningServer) -> None:
    url = "data:image/png;base64," + base64.b64encode(bytes(150_000)).decode()
    turn = {"model": server.model, "session_id": 7, "interactive_mode": True, "image_url": url, "prompt": "hi"}
    assert requests.post(server.url + "/v1/chat/interactive", json=turn, timeout=10).status_code == 200
    wait_for_used(server, 0)
    again = {"model": server.model, "session_id": 7, "interactive_mode": True, "prompt": "and now?", "stream": True}
    with unfinished(server, 200_000):
        refused = requests.post(server.url + "/v1/chat/interactive", json=again, timeout=10)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_busy")
    server.backend.engine.hangs_after = 3

    with requests.post(server.url + "/v1/chat/interactive", json=again, stream=True, timeout=10) as stream:
        lines = stream.iter_lines()  # which would close the connection when it is dropped
        next(lines)
        assert metric(server, "budget_used") >= 150_000

    assert wait_for_used(server, 0) < 1.0


def respond(server: RunningServer, *, size: int = 0, **fields: Any) -> requests.Response:
    """A request to `/v1/responses`, with a picture of so many characters where `size` is given."""
    picture = {"type": "input_image", "image_url": "data:image/png;base64," + "A" * size}
    content = [{"type": "input_text", "text": "hi"}, *([picture] if size else [])]
    body = {"model": server.model, "input": [{"role": "user", "content": content}], **fields}
    return requests.post(server.url + "/v1/responses", json=body, timeout=10, stream=True)


def test_a_kept_conversation_counts_before_it_is_read_and_while_its_request_runs(server: RunningServer) -> None:
    short, large = respond(server).json()["id"], respond(server, size=150_000).json()["id"]
    paths = [f"{server.url}/v1/responses/{large}{rest}" for rest in ("", "/input_items?limit=100")]
    with unfinished(server, 200_000):
        answers = [respond(server, previous_response_id=large), *(requests.get(path, timeout=10) for path in paths)]
        assert [(answer.status_code, answer.json()["error"]["code"]) for answer in answers] == [(503, "server_busy")] * 3
        assert respond(server, previous_response_id=short).status_code == 200, "texts pass whatever pictures do"
        assert requests.delete(paths[0], timeout=10).status_code == 200, "nothing is read for it"
    large = respond(server, size=150_000).json()["id"]
    wait_for_used(server, 0)
    server.backend.engine.hangs_after = 3

    with respond(server, previous_response_id=large, stream=True) as stream:
        lines = stream.iter_lines()  # which would close the connection when it is dropped
        next(lines)
        assert metric(server, "budget_used") >= 150_000

    assert wait_for_used(server, 0) < 1.0


def test_an_answer_that_nobody_takes_counts_until_its_client_left() -> None:
    large = png() + bytes(16 << 20)  # more than two kernels' buffers take
    with running_server(fake_config(vision=VisionConfig(max_media_bytes_in_flight=64 << 20))) as server:
        file_id = Client(server).upload(large).json()["id"]
        host, port = server.url.removeprefix("http://").split(":")
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect((host, int(port)))
            reader.sendall(f"GET /v1/files/{file_id}/content HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            wait_for_used(server, len(large))
        assert wait_for_used(server, 0) < 1.0
        assert Client(server).send("GET", f"/v1/files/{file_id}/content").content == large


class Answering:
    """One request, of whose answer the client takes a message at a time."""

    def __init__(self, app: ASGIApp) -> None:
        self.media = MediaBudgets(VisionConfig(max_media_bytes_in_flight=LIMIT, budget_wait_s=0.0))
        self.taken: list[Message] = []
        self._may_take = asyncio.Semaphore(0)
        context = SimpleNamespace(backend=SimpleNamespace(media=self.media))
        server = SimpleNamespace(state=SimpleNamespace(context=context))
        scope = {"type": "http", "app": server, "path": "/", "headers": [], "client": ("192.0.2.1", 1)}
        self.task = asyncio.create_task(HoldsMedia(app)(scope, self._receive, self._send))

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.taken)

    async def _receive(self) -> Message:
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self._may_take.acquire()
        self.taken.append(message)

    async def take(self, num_messages: int) -> None:
        for _ in range(num_messages):
            self._may_take.release()
        for _ in range(10 * num_messages):
            await asyncio.sleep(0)


async def test_a_large_answer_is_sent_in_pieces_and_counts_until_the_last_is_taken() -> None:
    answer = bytes(range(250)) * 1000
    sending = Answering(Response(answer))

    await sending.take(3)
    assert (sending.media.bytes.used, sending.task.done()) == (250_000, False)
    await sending.take(2)
    await sending.task

    assert sending.body == answer
    assert max(len(message.get("body", b"")) for message in sending.taken) == PIECE_BYTES
    assert [message.get("more_body", False) for message in sending.taken[1:]] == [True] * 3 + [False]
    assert sending.media.bytes.used == 0


@pytest.mark.parametrize("num_bytes", [0, 1, FREE_BYTES, FREE_BYTES + 1, 2 * PIECE_BYTES])
async def test_an_answer_of_any_size_arrives_whole(num_bytes: int) -> None:
    sending = Answering(Response(bytes(num_bytes)))

    await sending.take(4)
    await sending.task

    assert len(sending.body) == num_bytes
    assert sending.taken[-1].get("more_body", False) is False


async def test_a_large_answer_without_room_becomes_a_refusal() -> None:
    sending = Answering(Response(bytes(250_000)))
    others = await sending.media.bytes.reserve(200_000)

    await sending.take(2)
    await sending.task

    assert sending.taken[0]["status"] == 503
    assert json.loads(sending.body)["error"]["code"] == "server_busy"
    others.release()
    assert sending.media.bytes.used == 0


async def test_an_answer_counts_for_what_its_request_does_not_hold_already() -> None:
    """A kept conversation of more than half of a client's share can be read."""

    async def app(*asgi: Any) -> None:
        await hold_bytes(200_000)
        await Response(bytes(210_000))(*asgi)

    sending = Answering(app)

    await sending.take(2)
    assert sending.media.bytes.used == 210_000
    await sending.take(3)
    await sending.task

    assert sending.taken[0]["status"] == 200
    assert sending.media.bytes.used == 0
