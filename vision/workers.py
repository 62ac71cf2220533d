"""Worker processes that can be killed: a pool that hands frames to them and takes their answers, without ever blocking the event loop.

A worker that hangs or dies costs its own job only and is replaced; where somebody else killed it, the job is done again by another one.
Knows nothing of pictures: what workers do is their module's business.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vision.confinement import ALL
from vision.frames import Frame, FrameReader, NoDescriptorsError, send_frame

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

LEAVING_S = 1.0
_LOOK_S = 0.01
_PACKAGE_ROOT = Path(__file__).parent.parent
_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")  # no keys, tokens or proxies
_SINGLE_THREADED = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class WorkerError(Exception):
    """A worker could not start, died, or took too long; never the fault of another job than its own."""


class WorkerTimeoutError(WorkerError):
    pass


class WorkerEndedError(WorkerError):
    """It ended in the middle of a job, for something that the job had it do."""


class WorkerKilledError(WorkerError):
    """Somebody else killed it, the kernel for want of memory perhaps: the job may have had no part in that."""


class _Worker:
    """One process and our end of its socket. `python -m module FD`, first frame `settings`, then one answer per frame."""

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        """Blocks for the moment that starting a process takes. Raises OSError where it cannot be started."""
        self.ending: asyncio.Task[None] | None = None
        self.is_leaving = False  # it closed its end: its exit status will tell why
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.connection.setblocking(False)
        with theirs, contextlib.ExitStack() as ours:
            ours.enter_context(self.connection)
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # the terminal's interrupt is for the server, which ends its workers itself
            )
            ours.pop_all()

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    async def exchange(self, frame: Frame) -> Frame:
        """Raises EOFError, OSError or ValueError when the worker died or broke the protocol; NoDescriptorsError when it did not."""
        send_frame(self.connection, frame)
        reader = FrameReader(self.connection)
        try:
            while True:
                await _readable(self.connection)
                with contextlib.suppress(BlockingIOError):  # woken for nothing
                    if (reply := reader.read()) is not None:
                        return reply
        finally:
            reader.close()

    def end(self) -> None:
        """Kills it, hung or stopped ones too. Blocks until the kernel took it away."""
        if self.is_leaving:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(LEAVING_S)
        self.process.kill()
        self.process.wait()
        self.connection.close()


class _Slots:
    """Idle workers, None where one is yet to start. Each is handed to who waits longest, which later callers cannot overtake then."""

    def __init__(self) -> None:
        self._idle: deque[_Worker | None] = deque()
        self._turns: deque[asyncio.Future[_Worker | None]] = deque()

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    async def take(self) -> _Worker | None:
        if self._idle:  # then nobody waits
            return self._idle.popleft()
        turn: asyncio.Future[_Worker | None] = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it came at the last moment
                self.put(turn.result())
            raise

    def put(self, worker: _Worker | None) -> None:
        while self._turns:
            turn = self._turns.popleft()
            if not turn.done():  # else its caller left
                turn.set_result(worker)
                return
        self._idle.append(worker)


class WorkerPool:
    """`num_workers` processes of one module; each does one job at a time, first come first served."""

    def __init__(
        self,
        module: str,
        *,
        num_workers: int,
        settings: bytes,
        timeout_s: float,
        start_timeout_s: float,
        abandon_s: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`settings`: body of each worker's first frame. `abandon_s`: how long a job may go on that nobody waits for any more.

        `environment`: what the workers see beside the little that they inherit.
        """
        self._module = module
        self._num_workers = num_workers
        self._settings = settings
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._abandon_s = abandon_s
        self._environment = clean_environment(environment)
        self._slots = _Slots()
        self._workers: set[_Worker] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    async def open(self) -> Frame:
        """Starts all workers; the answer of the first one to its settings. Raises WorkerError."""
        starts = await asyncio.gather(*(self._start() for _ in range(self._num_workers)), return_exceptions=True)
        failures = [start for start in starts if isinstance(start, BaseException)]
        if failures:
            await self.close()
            raise failures[0]
        started = [start for start in starts if not isinstance(start, BaseException)]
        for worker, _ in started:
            self._slots.put(worker)
        return started[0][1]

    async def open_confined(self, kind: str) -> None:
        """`open` for workers that `serve_confined`. Warns of what the system could not take from them; `kind` of worker: for the log."""
        granted = msgspec.msgpack.decode((await self.open()).body, type=list[str])
        if missing := [name for name in ALL if name not in granted]:
            logger.warning("%s workers are limited in memory and time, but the system cannot keep them from: %s", kind, ", ".join(missing))

    async def close(self) -> None:
        """Kills the workers; jobs under way or waiting end with WorkerError."""
        self._is_closed = True
        self._slots.put(None)  # wakes those who wait, one after another
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        ends = await asyncio.gather(*(self._end(worker) for worker in tuple(self._workers)), return_exceptions=True)
        for error in filter(None, ends):
            logger.error("a process of %s could not be ended: %r", self._module, error)

    @property
    def num_idle(self) -> int:
        return self._slots.num_idle

    @property
    def process_ids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    async def call(self, frame: Frame) -> Frame:
        """The worker's answer, whose arrays are the caller's. Takes over `frame` and closes its arrays.

        Raises WorkerError, WorkerTimeoutError, NoDescriptorsError, and the MediaError that the worker answered with.
        """
        try:
            worker = await self._slots.take()
        except asyncio.CancelledError:
            frame.close()
            raise
        job = self._spawn(self._run(worker, frame))
        try:
            await asyncio.wait((job,))
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_later(self._abandon_s, job.cancel)
            job.add_done_callback(_discard)
            raise
        if job.cancelled():
            raise self._closed_error()
        return job.result()

    async def _run(self, worker: _Worker | None, frame: Frame) -> Frame:
        """One job, to its end even when the caller left, so that the worker is idle again or replaced."""
        is_idle, reason = False, "nobody waited for it"
        try:
            worker = await self._revived(worker)
            try:
                reply = await self._exchange(worker, frame)
            except WorkerKilledError as error:
                logger.warning("%s; the job is done again", error)
                worker = (await self._start())[0]
                reply = await self._exchange(worker, frame)
            is_idle = True
        except NoDescriptorsError:  # it has done its job
            is_idle = True
            raise
        except WorkerError as error:
            reason = str(error)
            raise
        except OSError as error:  # of a process that could not be started
            raise WorkerError(f"{self._module} could not be started: {error}") from None
        finally:
            frame.close()
            self._give_back(worker, is_idle=is_idle, reason=reason)
        if reply.failure is not None:
            reply.close()
            raise reply.failure.as_error()
        return reply

    async def _exchange(self, worker: _Worker, frame: Frame) -> Frame:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await worker.exchange(frame)
        except TimeoutError:
            raise WorkerTimeoutError(f"{self._module} took longer than {self._timeout_s:g} s") from None
        except NoDescriptorsError:
            raise
        except (EOFError, OSError) as error:
            worker.is_leaving = isinstance(error, EOFError)
            await self._end(worker)
            if worker.process.returncode == -signal.SIGKILL:
                raise WorkerKilledError(f"{self._module} (process {worker.process.pid}) was killed in the middle of a job") from None
            status = worker.process.returncode
            raise WorkerEndedError(f"{self._module} ended in the middle of a job: {error!r}, exit status {status}") from None
        except ValueError as error:
            raise WorkerError(f"{self._module} does not keep to the protocol: {error}") from None

    def _give_back(self, worker: _Worker | None, *, is_idle: bool, reason: str) -> None:
        if is_idle or worker is None or self._is_closed:
            self._slots.put(worker)
        else:
            self._spawn(self._replace(worker, reason))

    async def _replace(self, worker: _Worker, reason: str) -> None:
        logger.warning("%s (process %d) failed at a job and is replaced: %s", self._module, worker.process.pid, reason)
        replacement = None
        try:
            await self._end(worker)
            replacement, _ = await self._start()
        except (WorkerError, OSError) as error:
            logger.error("%s cannot be replaced: %s; the next job tries again", self._module, error)
        finally:
            self._slots.put(replacement)

    async def _revived(self, worker: _Worker | None) -> _Worker:
        """The worker, or a new one where there is none or it died while it was idle."""
        if self._is_closed:
            raise self._closed_error()
        if worker is not None and worker.is_alive:
            return worker
        if worker is not None:
            await self._end(worker)
        return (await self._start())[0]

    async def _start(self) -> tuple[_Worker, Frame]:
        worker = _Worker(self._module, self._environment)
        self._workers.add(worker)
        try:
            async with asyncio.timeout(self._start_timeout_s):
                ready = await worker.exchange(Frame(self._settings))
            if ready.failure is not None:
                raise WorkerError(f"{self._module} could not start: {ready.failure.message}")
        except BaseException as error:
            await self._end(worker)
            if isinstance(error, (EOFError, OSError, ValueError)):  # TimeoutError among them
                raise WorkerError(f"{self._module} could not start within {self._start_timeout_s:g} s: {error!r}") from None
            raise
        return worker, ready

    async def _end(self, worker: _Worker) -> None:
        if worker.ending is None or _has_failed(worker.ending):
            worker.ending = asyncio.create_task(_ended(worker))
        await asyncio.shield(worker.ending)
        self._workers.discard(worker)  # only now: where this is cancelled, `close()` waits for it

    def _closed_error(self) -> WorkerError:
        return WorkerError(f"{self._module} was stopped")

    def _spawn(self, work: Coroutine[Any, Any, Result]) -> "asyncio.Task[Result]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _ended(worker: _Worker) -> None:
    try:
        await asyncio.to_thread(worker.end)
    except RuntimeError:  # no thread can be started
        worker.process.kill()
        while worker.is_alive:  # noqa: ASYNC110  (of a killed process there is no event)
            await asyncio.sleep(_LOOK_S)
        worker.connection.close()


def _has_failed(task: "asyncio.Task[None]") -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _discard(job: "asyncio.Task[Frame]") -> None:
    """What came for a caller who left."""
    if not job.cancelled() and job.exception() is None:
        job.result().close()


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(connection, _wake, ready)
    try:
        await ready
    finally:
        loop.remove_reader(connection)


def _wake(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a worker process sees of ours: where things are, no secrets; and one thread for each library that would take all cores."""
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    search_path = os.pathsep.join(filter(None, (str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH"))))
    return {**inherited, **_SINGLE_THREADED, "PYTHONPATH": search_path, **(extra or {})}
