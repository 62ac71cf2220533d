"""A pool whose processes are scripted: what becomes of them where the system fails."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from vision import workers
from vision.frames import Frame
from vision.workers import WorkerError, WorkerPool


class FakeWorker:
    """Answers its settings, and a job as its body says."""

    made: list["FakeWorker"]
    failures: list[Exception]  # of the next ends

    def __init__(self, module: str, environment: dict[str, str]) -> None:
        self.ending: asyncio.Task[None] | None = None
        self.is_leaving = False
        self.is_alive = True
        self.process = SimpleNamespace(pid=1, returncode=None, kill=self._kill)
        self.connection = SimpleNamespace(close=lambda: None)
        self.made.append(self)

    async def exchange(self, frame: Frame) -> Frame:
        if frame.body == b"breaks":
            raise ValueError("breaks the protocol")
        return Frame()

    def end(self) -> None:
        if self.failures:
            raise self.failures.pop()
        self._kill()

    def _kill(self) -> None:
        self.is_alive = False


@pytest.fixture
async def pool(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[WorkerPool]:
    FakeWorker.made, FakeWorker.failures = [], []
    monkeypatch.setattr(workers, "_Worker", FakeWorker)
    pool = WorkerPool("fake", num_workers=1, settings=b"", timeout_s=5, start_timeout_s=5, abandon_s=5)
    await pool.open()
    yield pool
    await pool.close()


async def test_who_waits_longest_is_served_next_whoever_comes_meanwhile(pool: WorkerPool) -> None:
    """Regression: a call that came as the worker came free went first, and who had waited went behind all others."""
    order: list[bytes] = []

    async def call(body: bytes) -> None:
        await pool.call(Frame(body))
        order.append(body)

    worker = await pool._slots.take()
    waiting = [asyncio.create_task(call(body)) for body in (b"first", b"second", b"third")]
    await asyncio.sleep(0)
    late = asyncio.create_task(call(b"late"))
    pool._slots.put(worker)
    await asyncio.gather(*waiting, late)

    assert order == [b"first", b"second", b"third", b"late"]


async def test_a_turn_whose_caller_leaves_as_it_comes_is_the_next_ones(pool: WorkerPool) -> None:
    worker = await pool._slots.take()
    first, second, third = (asyncio.create_task(pool.call(Frame(body))) for body in (b"first", b"second", b"third"))
    await asyncio.sleep(0)

    first.cancel()
    pool._slots.put(worker)  # to the second, which leaves too
    second.cancel()
    await asyncio.wait_for(third, 5)

    assert (first.cancelled(), second.cancelled()) == (True, True)
    assert pool.num_idle == 1


async def test_a_worker_is_ended_where_no_thread_can_be_started_for_that(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def to_thread(function: Callable[[], Any]) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(workers.asyncio, "to_thread", to_thread)

    with pytest.raises(WorkerError):
        await pool.call(Frame(b"breaks"))
    await pool.call(Frame())

    assert [worker.is_alive for worker in FakeWorker.made] == [False, True]
    assert len(pool.process_ids) == 1


async def test_a_worker_that_could_not_be_ended_is_ended_at_the_next_try(pool: WorkerPool) -> None:
    FakeWorker.failures = [PermissionError("not now")]
    with pytest.raises(WorkerError):
        await pool.call(Frame(b"breaks"))
    await pool.call(Frame())
    assert [worker.is_alive for worker in FakeWorker.made] == [True, True]

    await pool.close()

    assert [worker.is_alive for worker in FakeWorker.made] == [False, False]


async def test_a_pool_is_closed_also_where_a_worker_cannot_be_ended(pool: WorkerPool) -> None:
    FakeWorker.failures = [PermissionError("never")]
    await pool.close()
    assert [worker.is_alive for worker in FakeWorker.made] == [True]

    await pool.close()

    assert [worker.is_alive for worker in FakeWorker.made] == [False]
