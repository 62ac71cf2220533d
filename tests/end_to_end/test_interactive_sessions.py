"""Five turns about one picture with the embedded model: they survive a restart, and move to another server."""

import contextlib
import http.server
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import requests

from tests.end_to_end.pictures import drawn
from tests.redis_server import redis_server
from tests.server_process import ServerProcess, server_process

TURNS = (
    "Describe the image please",
    "Which colour has the shape?",
    "Where is it?",
    "Write one sentence about what we talked about.",
    "Thank you. Was there a second shape?",
)
BLOCK_SIZE = 16
COUNTERS = ("vlm:prompt_tokens_total", "vlm:prefix_cache_hit_tokens_total")


def server_with(store: str) -> "contextlib.AbstractContextManager[ServerProcess]":
    return server_process(None, "--session-store", store, "--allow-private-media", "127.0.0.0/8", "--session-len", "1024")


@contextlib.contextmanager
def picture_url() -> Iterator[str]:
    """A picture that is gone when the block ends."""

    class Picture(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(drawn(3))

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Picture) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listener.server_address[1]}/picture.png"
        listener.shutdown()
        thread.join()


def take_turn(server: ServerProcess, number: int, **fields: Any) -> dict[str, Any]:
    """Turn `number`, from 0, of session 7; the first one with the picture."""
    body = {"prompt": TURNS[number], "session_id": 7, "interactive_mode": True, "temperature": 0, "request_output_len": 24, **fields}
    response = requests.post(f"{server.url}/v1/chat/interactive", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return dict(response.json())


def first_turn(server: ServerProcess, **fields: Any) -> dict[str, Any]:
    with picture_url() as url:
        return take_turn(server, 0, image_url=url, **fields)


def num_prefilled(server: ServerProcess, before: dict[str, float]) -> int:
    """Prompt tokens computed since `before`, rather than taken from the prefix cache."""
    asked, cached = (server.metric(name) - before[name] for name in COUNTERS)
    return int(asked - cached)


def counters(server: ServerProcess) -> dict[str, float]:
    return {name: server.metric(name) for name in COUNTERS}


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with redis_server() as url:
        yield url


def assert_each_follows_the_last(answers: list[dict[str, Any]]) -> None:
    for earlier, later in pairwise(answers):
        assert later["history_tokens"] == earlier["history_tokens"] + earlier["input_tokens"] + earlier["tokens"]


@pytest.mark.full
def test_a_session_with_a_picture_survives_a_restart_and_a_move_and_prefills_its_own_text_alone(tmp_path, redis_url) -> None:
    """In a file, with a restart after turn 2; in Redis, with a move to a second server after turn 3. Both talk as an unbroken one does."""
    file = str(tmp_path / "sessions.sqlite3")
    with server_with(file) as server:
        in_file = [first_turn(server), take_turn(server, 1)]
    with server_with(file) as server:
        in_file += [take_turn(server, number) for number in (2, 3, 4)]
    with server_with(redis_url) as first:
        in_redis = [first_turn(first), take_turn(first, 1), take_turn(first, 2)]
        with server_with(redis_url) as second:
            in_redis.append(take_turn(second, 3))
            before = counters(second)
            in_redis.append(take_turn(second, 4))
            prefilled = num_prefilled(second, before)
            unbroken = [first_turn(second, session_id=8), *(take_turn(second, number, session_id=8) for number in (1, 2, 3, 4))]

    assert in_file == in_redis == unbroken
    assert len({answer["text"] for answer in in_file}) > 1
    assert in_file[0]["input_tokens"] > 64, "the picture's tokens"
    assert_each_follows_the_last(in_file)
    own = in_redis[4]["input_tokens"]
    assert own < prefilled <= own + BLOCK_SIZE, "its own text, and what of the turn before does not fill a block"
