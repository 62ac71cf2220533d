"""Bytes of request bodies and files in memory: counted as they arrive, given back with the request, and not all for one client."""

import base64
import contextlib
import http.client
import json
import time
from collections.abc import Iterator

import pytest
import requests

from tests.contract.running import RunningServer, fake_config, running_server
from tests.vision.pictures import png
from tests.vlm_server.files_client import Client
from vision.config import VisionConfig
from vlm_server.body_budget import network_of

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


def test_kept_pictures_of_a_session_count_while_its_turn_runs(server: RunningServer) -> None:
    url = "data:image/png;base64," + base64.b64encode(bytes(60_000)).decode()
    turn = {"model": server.model, "session_id": 7, "interactive_mode": True, "image_url": url, "prompt": "hi"}
    assert requests.post(server.url + "/v1/chat/interactive", json=turn, timeout=10).status_code == 200
    wait_for_used(server, 0)
    server.backend.engine.hangs_after = 3
    again = {"model": server.model, "session_id": 7, "interactive_mode": True, "prompt": "and now?", "stream": True}

    with requests.post(server.url + "/v1/chat/interactive", json=again, stream=True, timeout=10) as stream:
        lines = stream.iter_lines()  # which would close the connection when it is dropped
        next(lines)
        assert metric(server, "budget_used") >= 60_000

    assert wait_for_used(server, 0) < 1.0
