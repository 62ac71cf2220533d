"""A full waiting room refuses before any work is done, and forgets nobody and nothing."""

import json
import socket
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.request import QueueFullError
from tests.contract.running import RunningServer, fake_config, running_server
from vlm_server.app import create_app
from vlm_server.config import ALPACA
from vlm_server.waiting_room import MAX_RETRY_AFTER_S, RESERVED_S, WAITING_PATHS, Place, WaitingRoom

HELLO = [{"role": "user", "content": "hi"}]
SLOW = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://example.org/slow.png"}}]}]

# Posts that generate nothing, and the one that knows only from its body.
OTHERS = {
    "/tokenize",
    "/detokenize",
    "/v1/encode",
    "/pooling",
    "/v1/files",
    "/v1/messages/count_tokens",
    "/anthropic/v1/messages/count_tokens",
    "/v1/responses/{response_id}/cancel",
    "/abort_request",
    "/v1/chat/interactive",
}


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def answered(room: WaitingRoom, tenant: str = "") -> None:
    room.submit(tenant)
    room.begin(tenant)


def small_room() -> Any:
    return running_server(fake_config(engine=EngineConfig(model_folder="/no/such/folder", max_waiting=2)))


def begun(server: RunningServer, path: str = "/v1/chat/completions", *, key: str = "", **fields: Any) -> socket.socket:
    """A connection with a request whose answer has not begun."""
    data = json.dumps({"model": server.model, "messages": HELLO, **fields}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def post(server: RunningServer, path: str, *, key: str = "", **fields: Any) -> requests.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return requests.post(server.url + path, json={"model": server.model, **fields}, headers=headers, timeout=10)


@pytest.mark.parametrize("compat", ["none", ALPACA])
def test_every_route_that_generates_is_known(compat: str) -> None:
    paths = create_app(fake_config(compat=compat)).openapi()["paths"]
    posts = {path for path, methods in paths.items() if "post" in methods}

    assert posts - OTHERS == WAITING_PATHS - {"/anthropic/v1/messages"}


@pytest.mark.parametrize("messages", [HELLO, SLOW])
def test_whoever_comes_into_a_full_room_is_refused_unread(messages: Any) -> None:
    """Whether those before wait for the engine or for their pictures. What is refused need not even be a request."""
    with small_room() as server:
        server.backend.engine.hangs_after = 0
        waiting = [begun(server, messages=messages) for _ in range(2)]
        assert server.backend.activity.has_begun_within(5, count=2)

        refused = [requests.post(server.url + path, data=b"no JSON", timeout=10) for path in sorted(WAITING_PATHS)]
        turn = post(server, "/v1/chat/interactive", prompt="hi")
        cancelled = post(server, "/v1/chat/interactive", session_id=1, cancel=True)
        counted = post(server, "/tokenize", prompt="hi")

        assert not server.backend.activity.has_begun_within(0, count=3)
        for connection in waiting:
            connection.close()
    assert [answer.status_code for answer in (*refused, turn)] == [429] * (len(WAITING_PATHS) + 1)
    assert all(1 <= int(answer.headers["retry-after"]) <= MAX_RETRY_AFTER_S for answer in (*refused, turn))
    assert {answer.json()["error"].get("code") for answer in refused} == {"queue_full", None}  # Anthropic's has it in its details
    assert turn.json()["error"]["code"] == "queue_full"
    assert (cancelled.status_code, counted.status_code) == (200, 200)


@pytest.mark.parametrize("messages", [HELLO, SLOW])
def test_those_who_leave_make_room(messages: Any) -> None:
    with small_room() as server:
        server.backend.engine.hangs_after = 0
        for connection in [begun(server, messages=messages) for _ in range(2)]:
            assert server.backend.activity.has_begun_within(5, count=2)
            connection.close()
        assert server.backend.activity.was_left_within(5)
        server.backend.engine.hangs_after = None

        assert post(server, "/v1/chat/completions", messages=HELLO).status_code == 200


def test_an_answer_that_has_begun_takes_no_room() -> None:
    with small_room() as server:
        server.backend.engine.hangs_after = 1
        streams, answers = [], []
        for _ in range(5):
            streams.append(begun(server, stream=True))
            answers.append(streams[-1].recv(12))
        for stream in streams:
            stream.close()

    assert answers == [b"HTTP/1.1 200"] * 5


def test_requests_that_fail_leave_their_place() -> None:
    bad = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://example.org/bad.png"}}]}]
    with small_room() as server:
        statuses = [post(server, "/v1/chat/completions", messages=messages).status_code for messages in [bad, [], HELLO] * 4]

    assert statuses == [400, 400, 200] * 4


def test_a_place_is_kept_for_a_while_and_not_for_ever() -> None:
    clock = Clock()
    room = WaitingRoom(1, clock=clock)
    slow, other = Place(room), Place(room)
    slow.enter()

    with pytest.raises(QueueFullError, match="1 requests wait already, at most 1 may"):
        other.enter()
    clock.now_s += RESERVED_S
    other.enter()
    slow.leave()

    assert room.num_waiting == 1


def test_the_time_to_come_again_follows_the_rate() -> None:
    """A quarter of 400 at ten a second; at one in ten seconds, no longer than the limit."""
    clock = Clock()
    room = WaitingRoom(400, clock=clock)
    assert room.retry_after_s() == 1
    for _ in range(100):
        clock.now_s += 0.1
        answered(room)

    fast = room.retry_after_s()
    for _ in range(100):
        clock.now_s += 10
        answered(room)

    assert fast == 10
    assert room.retry_after_s() == MAX_RETRY_AFTER_S


def test_a_full_room_has_one_place_for_each_key_that_has_none() -> None:
    """Prepared or submitted, a tenant's first request counts; without keys there is nobody to keep apart."""
    room = WaitingRoom(1, clock=Clock())
    Place(room).enter()
    first = Place(room, "a")
    first.enter()

    for tenant in ("", "a"):
        with pytest.raises(QueueFullError, match="2 requests wait already"):
            Place(room, tenant).enter()
    first.leave()
    room.submit("a")
    with pytest.raises(QueueFullError):
        Place(room, "a").enter()
    room.begin("a")
    Place(room, "a").enter()

    assert room.num_waiting == 2


def test_a_key_gets_in_while_another_one_fills_the_room() -> None:
    config = fake_config(engine=EngineConfig(model_folder="/no/such/folder", max_waiting=2), api_keys=("crowd", "guest"))
    with running_server(config) as server:
        server.backend.engine.hangs_after = 0
        crowd = [begun(server, key="crowd") for _ in range(2)]
        assert server.backend.activity.has_begun_within(5, count=2)

        refused = post(server, "/v1/chat/completions", key="crowd", messages=HELLO)
        guest = begun(server, key="guest")

        assert refused.status_code == 429
        assert server.backend.activity.has_begun_within(5, count=3)
        for connection in (*crowd, guest):
            connection.close()


@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["enter", "leave", "wait"])), max_size=60),
    st.lists(st.sampled_from(["", "a", "b"]), min_size=6, max_size=6),
)
def test_the_room_never_holds_more_than_its_limit_and_one_of_each_tenant_and_is_empty_in_the_end(
    steps: list[tuple[int, str]], tenants: list[str]
) -> None:
    clock = Clock()
    room = WaitingRoom(3, clock=clock)
    places = [Place(room, tenant) for tenant in tenants]
    inside: dict[int, float] = {}
    for index, what in steps:
        if what == "wait":
            clock.now_s += index
        elif what == "leave":
            places[index].leave()
            inside.pop(index, None)
        elif index not in inside:
            inside = {number: since_s for number, since_s in inside.items() if clock.now_s - since_s < RESERVED_S}
            is_first = bool(tenants[index]) and all(tenants[number] != tenants[index] for number in inside)
            try:
                places[index].enter()
                assert len(inside) < 3 or is_first
                inside[index] = clock.now_s
            except QueueFullError:
                assert len(inside) >= 3
                assert not is_first

    for place in places:
        place.leave()
    assert room.num_waiting == 0
