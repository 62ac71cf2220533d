"""A session store whose disk is full: every route that keeps something says so, the others work, and all do when there is room again."""

import base64
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.contract.fake_engine import DEFAULT_REPLY, FakeBackend
from tests.contract.running import MODEL, fake_config, serving
from vlm_server.app import create_app
from vlm_server.sessions.sqlite_store import SqliteStore
from vlm_server.sessions.store import RecordStore

PICTURE = b"x" * 400_000  # of many pages; the scripted pipeline takes anything


class Disk:
    """How much the store's file may hold, as SQLite itself is told."""

    def __init__(self) -> None:
        self.store: SqliteStore | None = None

    def set_room(self, num_pages: int) -> None:
        assert self.store
        self.store._thread.submit(self.store._connection.execute, f"PRAGMA max_page_count = {num_pages}").result()


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def url(disk: Disk, tmp_path: Path) -> Iterator[str]:
    @contextlib.asynccontextmanager
    async def open_store(where: str) -> AsyncIterator[RecordStore]:
        disk.store = await SqliteStore.open(tmp_path / "sessions.sqlite3")
        yield disk.store
        await disk.store.close()

    with serving(create_app(fake_config(), open_backend=FakeBackend().open, open_store=open_store)) as url:
        assert requests.get(f"{url}/health", timeout=10).status_code == 200  # it is open
        yield url


PICTURE_URL = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"  # kept by sessions and responses
INPUT = [{"role": "user", "content": [{"type": "input_image", "image_url": PICTURE_URL}, {"type": "input_text", "text": "hi"}]}]


def asked(url: str, path: str, **fields: Any) -> requests.Response:
    return requests.post(f"{url}{path}", json={"model": MODEL, **fields}, timeout=10)


def upload(url: str) -> requests.Response:
    return requests.post(f"{url}/v1/files", files={"file": ("a.png", PICTURE)}, data={"purpose": "vision"}, timeout=10)


def turn(url: str, **fields: Any) -> requests.Response:
    return asked(url, "/v1/chat/interactive", prompt="hi", image_url=PICTURE_URL, session_id=1, interactive_mode=True, **fields)


def assert_full(response: requests.Response) -> None:
    assert (response.status_code, response.json()["error"]["code"]) == (507, "session_store_full")
    assert response.headers["Retry-After"] == "60"


def test_what_is_to_be_kept_is_refused_while_the_disk_is_full_and_kept_when_there_is_room(url: str, disk: Disk) -> None:
    disk.set_room(1)  # no more than there are

    assert_full(upload(url))
    assert_full(asked(url, "/v1/responses", input=INPUT))
    assert_full(turn(url))
    assert asked(url, "/v1/responses", input=INPUT, store=False).status_code == 200
    chat = asked(url, "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}])
    assert chat.json()["choices"][0]["message"]["content"] == DEFAULT_REPLY

    disk.set_room(1 << 20)

    kept = asked(url, "/v1/responses", input=INPUT)
    assert requests.get(f"{url}/v1/responses/{kept.json()['id']}", timeout=10).status_code == 200
    assert (turn(url).status_code, upload(url).status_code) == (200, 200)
    assert turn(url, stream=False).json()["history_tokens"] > 0


def test_a_stream_that_could_not_be_kept_ends_with_the_reason(url: str, disk: Disk) -> None:
    disk.set_room(1)

    turned = [json.loads(line) for line in turn(url, stream=True).iter_lines()]
    responded = asked(url, "/v1/responses", input=INPUT, stream=True).text

    assert turned[-1]["error"]["code"] == "session_store_full"
    assert "session_store_full" in responded
    assert "response.failed" in responded
    assert "response.completed" not in responded
