"""Stores that fail for a while: what callers are told, that nothing waits for long, and that all is well when the reason is gone."""

import asyncio
import logging
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.exceptions import OutOfMemoryError, ResponseError

import vlm_server.sessions.redis_store as redis_store
import vlm_server.sessions.sqlite_store as sqlite_store
from tests.redis_relay import Relay, relay
from vlm_server.errors import to_api_error
from vlm_server.sessions.redis_store import RedisStore, _translated
from vlm_server.sessions.sqlite_store import SqliteStore
from vlm_server.sessions.store import Limits, Quota, RecordId, StoreError, StoreFullError

RECORD = RecordId("test", "tenant", "1")
PLENTY = Limits(ttl_s=3600, max_records=100)
LARGE = b"x" * 200_000


@pytest.fixture
async def disk_store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = await SqliteStore.open(tmp_path / "sessions.sqlite3")
    await store.put(RECORD, b"before", parts={"a": b"A"}, limits=PLENTY)
    yield store
    await store.close()


async def set_room(store: SqliteStore, num_pages: int) -> None:
    """As a disk that has no more: SQLite itself reports it full. (Outside a transaction, so not by the store's own way.)"""
    await store._run(lambda db: None)
    store._thread.submit(store._connection.execute, f"PRAGMA max_page_count = {num_pages}").result()


async def test_a_full_disk_refuses_what_is_to_be_kept_and_loses_nothing(disk_store: SqliteStore) -> None:
    await set_room(disk_store, 20)
    other = RecordId("test", "tenant", "2")

    for _ in range(2):
        with pytest.raises(StoreFullError):
            await disk_store.put(RECORD, LARGE, parts={"b": LARGE}, limits=PLENTY)
        with pytest.raises(StoreFullError):
            await disk_store.add(other, b"", parts={"a": LARGE}, ttl_s=60, quota=Quota(9, 1 << 30))

    assert await disk_store.get(RECORD) == b"before"
    assert await disk_store.get_parts(RECORD, ["a", "b"]) == {"a": b"A"}
    assert await disk_store.get(other) is None


async def test_a_full_disk_that_has_room_again_takes_everything(disk_store: SqliteStore) -> None:
    await set_room(disk_store, 20)
    with pytest.raises(StoreFullError):
        await disk_store.put(RECORD, LARGE, parts={}, limits=PLENTY)

    await set_room(disk_store, 1 << 20)

    await disk_store.put(RECORD, LARGE, parts={}, limits=PLENTY)
    assert await disk_store.get(RECORD) == LARGE
    assert await disk_store.acquire(RECORD, "mine", lifetime_s=60)


async def test_room_can_be_made_on_a_full_disk_by_deleting(disk_store: SqliteStore) -> None:
    await disk_store.put(RECORD, LARGE, parts={}, limits=PLENTY)
    await set_room(disk_store, 1)  # it counts no fewer than there are

    await disk_store.delete(RECORD)

    await disk_store.put(RECORD, LARGE[:100_000], parts={}, limits=PLENTY)


async def test_another_failure_of_the_file_is_no_full_disk_and_its_text_is_for_the_log(
    disk_store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(db: sqlite3.Connection) -> None:
        raise sqlite3.OperationalError("disk I/O error at /secret/path")

    with pytest.raises(StoreError) as failure, caplog.at_level(logging.ERROR):
        await disk_store._run(fail)

    assert not isinstance(failure.value, StoreFullError)
    assert "/secret/path" not in str(failure.value)
    assert "/secret/path" in caplog.text
    assert await disk_store.get(RECORD) == b"before"


@pytest.fixture
def writes_elsewhere(disk_store: SqliteStore, tmp_path: Path) -> Iterator[None]:
    """Another process, in the middle of a write to the file."""
    connection = sqlite3.connect(tmp_path / "sessions.sqlite3", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    yield
    connection.close()


@pytest.mark.usefixtures("writes_elsewhere")
async def test_reads_do_not_wait_for_another_process_that_writes(disk_store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_store, "BUSY_TIMEOUT_S", 0.0)

    assert await disk_store.get(RECORD) == b"before"
    assert await disk_store.get_parts(RECORD, ["a"]) == {"a": b"A"}
    assert await disk_store.num_bytes(RECORD) == 7
    assert await disk_store.values("test", "tenant") == {"1": b"before"}
    assert await disk_store.count("test") == 1
    with pytest.raises(StoreError):
        await disk_store.delete(RECORD)


@pytest.mark.usefixtures("writes_elsewhere")
async def test_many_writes_that_another_process_holds_up_wait_for_it_together(
    disk_store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "BUSY_TIMEOUT_S", 0.2)
    monkeypatch.setattr(sqlite_store, "TIMEOUT_S", 0.3)

    started_s = time.monotonic()
    failures = await asyncio.gather(*(disk_store.delete(RECORD) for _ in range(50)), return_exceptions=True)
    took_s = time.monotonic() - started_s

    assert all(isinstance(failure, StoreError) for failure in failures)
    assert took_s < 5, "each alone would wait 0.2 s"


@pytest.mark.parametrize("has_begun", [False, True])
async def test_a_write_that_is_late_is_not_done_whether_it_has_begun_or_not(
    disk_store: SqliteStore, monkeypatch: pytest.MonkeyPatch, has_begun: bool
) -> None:
    may_go = threading.Event()

    def write(db: sqlite3.Connection) -> None:
        may_go.wait(10)
        db.execute("DELETE FROM records")

    with monkeypatch.context() as patched:
        patched.setattr(sqlite_store, "TIMEOUT_S", 0.01)
        if not has_begun:
            disk_store._thread.submit(may_go.wait, 10)
        with pytest.raises(StoreError, match="busy; try again"):
            await disk_store._run(write)
    may_go.set()

    assert await disk_store.get(RECORD) == b"before"


def test_clients_are_told_that_the_store_is_full_or_out_of_reach() -> None:
    full, unreachable = to_api_error(StoreFullError()), to_api_error(StoreError("the session store does not answer; try again"))

    assert (full.status, full.code, full.headers["retry-after"]) == (507, "session_store_full", "60")
    assert (unreachable.status, unreachable.code, unreachable.headers["retry-after"]) == (503, "session_store_unavailable", "2")


@pytest.fixture
def network(redis_url: str) -> Iterator[Relay]:
    with relay(redis_url) as between:
        yield between


@pytest.fixture
async def store(network: Relay, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RedisStore]:
    monkeypatch.setattr(redis_store, "TIMEOUT_S", 0.3)
    store = await RedisStore.open(network.url)
    await store.put(RECORD, b"before", parts={}, limits=PLENTY)
    yield store
    await store.delete(RECORD)
    await store.close()


async def all_fail(store: RedisStore) -> list[str]:
    """What every kind of operation raises."""
    messages = []
    for operation in (
        store.get(RECORD),
        store.put(RECORD, b"lost", parts={}, limits=PLENTY),
        store.add(RecordId("test", "tenant", "2"), b"", parts={}, ttl_s=60, quota=Quota(9, 9)),
        store.acquire(RECORD, "token", lifetime_s=60),
        store.renew(RECORD, "token", lifetime_s=60),
        store.count("test"),
    ):
        with pytest.raises(StoreError) as failure:
            await operation
        messages.append(str(failure.value))
    return messages


async def test_a_redis_that_is_gone_fails_everything_at_once_and_is_found_again(store: RedisStore, network: Relay) -> None:
    network.cut()

    started_s = time.monotonic()
    messages = await all_fail(store)
    took_s = time.monotonic() - started_s
    network.mend()

    assert set(messages) == {"the session store does not answer; try again"}, "its address is not for clients"
    assert took_s < 5
    assert await store.get(RECORD) == b"before"
    assert await store.acquire(RECORD, "token", lifetime_s=0.001)


async def test_a_redis_that_was_gone_between_two_commands_is_not_noticed(store: RedisStore, network: Relay) -> None:
    network.cut()
    network.mend()

    assert await store.get(RECORD) == b"before"


async def test_a_redis_that_hangs_is_waited_for_once_and_no_longer(store: RedisStore, network: Relay) -> None:
    network.hold()

    started_s = time.monotonic()
    messages = await all_fail(store)
    took_s = time.monotonic() - started_s
    network.mend()

    assert len(messages) == 6
    assert took_s < 6 * 2 * redis_store.TIMEOUT_S + 1, "each waits for one command, and perhaps for a new connection's greeting"
    assert await store.get(RECORD) == b"before"


async def test_many_additions_to_a_redis_that_hangs_wait_for_it_together(store: RedisStore, network: Relay) -> None:
    quota = Quota(99, 99)
    network.hold()

    started_s = time.monotonic()
    additions = (store.add(RecordId("test", "tenant", f"new {n}"), b"", parts={}, ttl_s=60, quota=quota) for n in range(30))
    failures = await asyncio.gather(*additions, return_exceptions=True)
    took_s = time.monotonic() - started_s
    network.mend()

    assert all(isinstance(failure, StoreError) for failure in failures)
    assert took_s < 5, "each alone would wait 0.3 s"
    await store.add(RecordId("test", "tenant", "later"), b"", parts={}, ttl_s=0.001, quota=quota)


@pytest.mark.parametrize(
    "refusal",
    [
        OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
        ResponseError("MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk."),
    ],
)
async def test_a_redis_without_memory_or_disk_is_full(refusal: ResponseError) -> None:
    with pytest.raises(StoreFullError):
        async with _translated():
            raise refusal
