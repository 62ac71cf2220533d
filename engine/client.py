"""The server's handle on the engine process: starts it, watches it, restarts it, and turns its messages into async streams.

One event loop owns a client. Every request ends with a last output or an exception; leaving a stream aborts its request.
"""

import asyncio
import contextlib
import enum
import errno
import logging
import os
import socket
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

from engine.announcing import Announcement, Announcements
from engine.channel import AsyncSender, Decoder, read_frame
from engine.config import FOLDER_VARIABLE, EngineConfig
from engine.messages import Abort, Add, FromEngine, GetStats, Loading, Outputs, Ready, Rejected, SetVocabulary, Start, StartFailed, Stats
from engine.pulse import Pulse
from engine.request import (
    EngineDeadError,
    EngineError,
    EngineInfo,
    EngineStats,
    InvalidRequestError,
    Prompt,
    PromptTooLongError,
    QueueFullError,
    SamplingParams,
    StepOutput,
)
from engine.unread import UnreadOutputs

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 8.0  # after an engine that was ready: whoever sent what it died of is not to keep everybody else out for longer
MAX_START_BACKOFF_S = 30.0  # after one that was not: the next one will hardly fare better
HEALTHY_AFTER_S = 10.0  # an engine that served this long starts again after the first pause
PING_INTERVAL_S = 5.0
START_TIMEOUT_S = 1800.0
EXIT_TIMEOUT_S = 10.0

# Without an answer between two steps the process is killed. A step can be long: 512 prompt tokens of a 7B model are 7 TFLOP, a minute
# and more on two cores. It uses processor time meanwhile, though, which a process that is stopped or waits for itself does not.
HANG_TIMEOUT_S = 120.0
STALL_TIMEOUT_S = 10.0  # the same, of a process that uses no processor time
PULSE_INTERVAL_S = 1.0  # a pause of the server's own (a frozen container) is one look, not ten

# A decode step has hundreds of short parallel regions. Threads that sleep between them (OMP_WAIT_POLICY=PASSIVE) take as long to wake as a
# small region does; threads that spin for ever starve the process beside them. Milliseconds per step of the embedded model, one row, two
# cores of a Sapphire Rapids, 2026-11, alone / beside a busy process at nice 10 (as the vision workers are) / at nice 0:
#   PASSIVE 50 / 56 / 54     5,000 spins 39 / 74 / 73     20,000 spins 32 / 41 / 127     the default 32 / – / several hundred
# To tune again: `python -m benchmarks.embedded` with OMP_WAIT_POLICY or GOMP_SPINCOUNT set.
WAITING_THREADS = {"GOMP_SPINCOUNT": "20000"}

# oneDNN and its layer in torch keep compiled kernels for the last so many shapes. Each length of a prompt and each size of a batch is a
# shape for every layer: with their 1024 a process goes on growing for hours. Embedded model, a prompt of another length each time, 45 s,
# 2026-11: 1024 MiB when loaded, then 1390 MiB and growing with 1024, 1206 with 128, 1126 with 32, at the same speed.
KEPT_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}

_REJECTIONS: dict[str, Callable[[Rejected], EngineError]] = {
    "PromptTooLongError": lambda rejected: PromptTooLongError(*rejected.numbers),
    "QueueFullError": lambda rejected: QueueFullError(rejected.message),
}


class EngineState(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"  # it crashed; requests are refused until it is ready
    FAILED = "failed"  # it cannot start, or died in its first start; it is not tried again
    CLOSED = "closed"


@dataclass(slots=True)
class _Connection:
    """One life of the engine process. leftovers: what is cleared away when it has ended."""

    leftovers: contextlib.ExitStack
    process: asyncio.subprocess.Process
    sender: AsyncSender
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    decoder: Decoder = field(default_factory=lambda: Decoder(FromEngine))
    is_ready: asyncio.Event = field(default_factory=asyncio.Event)


class EngineClient:
    """See the module. `on_progress` is told the share of the weights that is loaded."""

    def __init__(self, config: EngineConfig, *, on_progress: Callable[[float], None] = lambda fraction: None) -> None:
        self.config = config
        self.state = EngineState.STARTING
        self.info: EngineInfo | None = None
        self.failure: str | None = None  # why the state is FAILED
        self.num_restarts = 0
        self._on_progress = on_progress
        self._streams = UnreadOutputs()
        self._stats_calls: dict[int, asyncio.Future[EngineStats]] = {}
        self._num_calls = 0
        self._vocabulary: str | None = None
        self._announcements = Announcements(lambda message: _sent(self._ready_sender().send_in_order(message)))
        self._connection: _Connection | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._first_ready: asyncio.Future[EngineInfo] | None = None
        self._ready_since_s: float | None = None  # of the process that runs, by the loop's clock

    @property
    def process_id(self) -> int | None:
        return self._connection.process.pid if self._connection else None

    async def start(self) -> EngineInfo:
        """Start the engine process and wait until it is ready. Raises EngineDeadError where it cannot serve the checkpoint."""
        self._first_ready = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise())
        return await asyncio.wait_for(asyncio.shield(self._first_ready), START_TIMEOUT_S)

    async def close(self) -> None:
        """End the engine process; what still runs gets an EngineDeadError."""
        self.state = EngineState.CLOSED
        if self._supervisor:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._fail_all(EngineDeadError("the engine is closed", is_final=True))

    def kill(self) -> None:
        """End the engine process in the middle of whatever it does; `close()` then need not wait for the end of a step."""
        if self._connection is not None:
            with contextlib.suppress(ProcessLookupError):
                self._connection.process.kill()

    async def set_vocabulary(self, vocabulary: str) -> None:
        """What the token ids mean, as the tokenizers library writes it: the engine, and each that replaces it, can follow grammars then."""
        await self._send(self._ready_sender(), SetVocabulary(vocabulary))
        self._vocabulary = vocabulary

    async def generate(self, prompt: Prompt, params: SamplingParams, *, request_id: str) -> AsyncGenerator[StepOutput, None]:
        """One request's outputs, the last one with its finish_reason.

        Raises PromptTooLongError, InvalidRequestError, QueueFullError or EngineDeadError, and UnreadError where too much was not taken in
        time. Closing the generator early aborts the request.
        """
        sender = self._ready_sender()
        if request_id in self._streams:
            raise InvalidRequestError(f"a request {request_id} is running already")
        queue = self._streams.open(request_id)  # before sending: no output can be missed
        is_over = False
        try:
            await self._send(sender, Add(request_id, prompt, params))
            while not is_over:
                output = await queue.get()
                is_over = output.finish_reason is not None
                yield output
        finally:
            self._streams.close(request_id)
            if not is_over and not queue.is_ended:
                self._abort(request_id)

    def announcement(self) -> Announcement:
        """For the pictures of a prompt that is being made; its `end` has to be called. Never fails, whatever the engine does."""
        return self._announcements.open()

    async def stats(self, *, timeout_s: float = 5.0) -> EngineStats:
        """The engine's gauges and counters. Raises EngineDeadError, or TimeoutError while a long step runs."""
        sender = self._ready_sender()
        self._num_calls += 1
        call_id = self._num_calls
        answer: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._stats_calls[call_id] = answer
        try:
            async with asyncio.timeout(timeout_s):  # of the sending too: an engine that hangs reads nothing
                await self._send(sender, GetStats(call_id))
                return await answer
        finally:
            self._stats_calls.pop(call_id, None)

    def _ready_sender(self) -> AsyncSender:
        if self.state is not EngineState.READY or self._connection is None:
            is_final = self.state in (EngineState.FAILED, EngineState.CLOSED)
            raise EngineDeadError(f"the engine is {self.state.value}" + (f": {self.failure}" if self.failure else ""), is_final=is_final)
        return self._connection.sender

    async def _send(self, sender: AsyncSender, message: object) -> None:
        await _sent(sender.send(message))

    def _abort(self, request_id: str) -> None:
        """Without waiting: callers are being cancelled. The supervisor's own task sends it."""
        if self.state is EngineState.READY and self._connection:
            task = asyncio.get_running_loop().create_task(self._send(self._connection.sender, Abort(request_id)))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # an engine that ended needs no abort

    async def _supervise(self) -> None:
        """Lives of the engine process, one after another, until `close()`."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            self._ready_since_s = None
            try:
                await self._live_once()
            except Exception:  # no thread or memory is left, say: the next life may have them
                logger.exception("the engine process cannot be served")
            self._note_end()
            if self.state is EngineState.FAILED:
                return
            backoff_s = self._next_backoff_s(backoff_s)
            logger.error("the engine process ended; it starts again in %.1f s", backoff_s)
            self.num_restarts += 1
            await asyncio.sleep(backoff_s)

    async def _live_once(self) -> None:
        """Start a process and serve its messages until it ends."""
        try:
            connection = self._connection = await _spawn(self.config)
        except OSError as error:  # no memory, processes or descriptors are left, which may pass
            logger.error("the engine process cannot be started: %s", error)
            return
        watchdog = asyncio.create_task(self._watch(connection))
        try:
            await self._send(connection.sender, Start(self.config))
            while (message := await _receive(connection)) is not None:
                if isinstance(message, Ready) and self._vocabulary is not None:  # this one replaces another; requests come after it
                    await self._send(connection.sender, SetVocabulary(self._vocabulary))
                self._handle(message)
                if isinstance(message, Ready):
                    connection.is_ready.set()
        except EngineDeadError:
            pass  # it takes no messages: it ended, or was killed
        except ValueError:  # of msgspec too
            logger.exception("the engine process sends what cannot be read; it is ended")
        finally:
            watchdog.cancel()
            self._note_end()  # before the process is waited for, which may take a while
            stopping = asyncio.create_task(_stop(connection))
            try:
                await asyncio.shield(stopping)
            finally:
                await stopping  # also where `close()` comes meanwhile

    def _note_end(self) -> None:
        """The process has ended or is about to: what waits for it waits no longer."""
        self._connection = None
        if self.info is None and self.state is EngineState.STARTING:  # what never worked will not work the next time
            self.state, self.failure = EngineState.FAILED, "the engine process ended while it started; the log says why"
        elif self.state is EngineState.READY:
            self.state = EngineState.RESTARTING
        self._fail_all(EngineDeadError(self.failure or "the engine process ended", is_final=self.state is EngineState.FAILED))

    def _next_backoff_s(self, backoff_s: float) -> float:
        if self._ready_since_s is None:
            return min(2 * backoff_s, MAX_START_BACKOFF_S)
        served_s = asyncio.get_running_loop().time() - self._ready_since_s
        return FIRST_BACKOFF_S if served_s > HEALTHY_AFTER_S else min(2 * backoff_s, MAX_BACKOFF_S)

    def _handle(self, message: FromEngine) -> None:
        match message:
            case Outputs(outputs):
                for output in outputs:
                    if not self._streams.put(output):
                        self._abort(output.request_id)
            case Rejected(request_id):
                self._streams.fail(request_id, _rejection(message))
            case Stats(call_id, stats):
                answer = self._stats_calls.get(call_id)
                if answer and not answer.done():
                    answer.set_result(stats)
            case Loading(fraction):
                self._report_progress(fraction)
            case Ready(info):
                self.info, self.state = info, EngineState.READY
                self._ready_since_s = asyncio.get_running_loop().time()
                if self._first_ready and not self._first_ready.done():
                    self._first_ready.set_result(info)
            case StartFailed(reason) if self.info is None:
                self.failure, self.state = reason, EngineState.FAILED
            case StartFailed(reason):  # of one that replaces another: what is missing may come back
                logger.error("the engine cannot start again yet: %s", reason)

    def _report_progress(self, fraction: float) -> None:
        try:
            self._on_progress(fraction)
        except Exception:  # the caller's: a terminal that is gone, say, is no reason to load the weights again
            logger.exception("the engine's progress cannot be reported")

    def _fail_all(self, error: EngineDeadError) -> None:
        self._streams.fail_all(error)
        for answer in self._stats_calls.values():
            if not answer.done():
                answer.set_exception(error)
        if self._first_ready and not self._first_ready.done() and error.is_final:
            self._first_ready.set_exception(error)

    async def _watch(self, connection: _Connection) -> None:
        """Kill a process that is not ready in time, or that is and then takes no messages or answers nothing for too long."""
        with contextlib.suppress(EngineDeadError, TimeoutError):  # not its end, which would end this task first
            await asyncio.wait_for(connection.is_ready.wait(), START_TIMEOUT_S)
            is_alive = True
            while is_alive:
                await asyncio.sleep(PING_INTERVAL_S)
                is_alive = await self._answers(connection)
        logger.error("the engine process hangs; it is killed")
        with contextlib.suppress(ProcessLookupError):
            connection.process.kill()

    async def _answers(self, connection: _Connection) -> bool:
        """Within the time that it has. Raises EngineDeadError, or TimeoutError where it is busy for far too long."""
        answer, pulse, still_s = asyncio.create_task(self.stats(timeout_s=HANG_TIMEOUT_S)), Pulse(connection.process.pid), 0.0
        try:
            while not (await asyncio.wait((answer,), timeout=PULSE_INTERVAL_S))[0]:
                still_s = still_s + PULSE_INTERVAL_S if pulse.is_still() else 0.0
                if still_s >= STALL_TIMEOUT_S:
                    return False
            await answer
            return True
        finally:
            answer.cancel()


async def _sent(sending: Awaitable[None]) -> None:
    """Raises QueueFullError, EngineDeadError."""
    try:
        await sending
    except OSError as error:
        if error.errno == errno.ETOOMANYREFS:
            raise QueueFullError("too many pictures are on their way to the engine; try again later") from error
        raise EngineDeadError("the engine process ended") from error


def _rejection(rejected: Rejected) -> EngineError:
    make = _REJECTIONS.get(rejected.kind)
    return make(rejected) if make else InvalidRequestError(rejected.message)


def engine_environment(config: EngineConfig) -> dict[str, str]:
    """Of the engine process: what CUDA, OpenMP and oneDNN read when they start."""
    chosen = {"CUDA_VISIBLE_DEVICES": ",".join(config.gpus)} if config.gpus else {}
    return {**KEPT_SHAPES, **({} if "OMP_WAIT_POLICY" in os.environ else WAITING_THREADS), **os.environ, **chosen}


async def _spawn(config: EngineConfig) -> _Connection:
    """A fresh engine process and the sockets to it. Raises OSError."""
    environment, leftovers = engine_environment(config), contextlib.ExitStack()
    if config.tp > 1:  # ranks meet through a file; one alone needs no place that can be written to
        folder = tempfile.TemporaryDirectory(prefix="vlm-engine-", ignore_cleanup_errors=True)
        environment[FOLDER_VARIABLE] = leftovers.enter_context(folder)
    to_engine, inbox = socket.socketpair()
    from_engine, outbox = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=from_engine)
    fds = [inbox.fileno(), outbox.fileno()]
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "engine.process",
            *map(str, fds),
            pass_fds=fds,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # the terminal's interrupt is for the server, whose running requests may finish
        )
    except BaseException:
        to_engine.close()
        writer.close()
        leftovers.close()
        raise
    finally:
        inbox.close()
        outbox.close()
    return _Connection(leftovers, process, AsyncSender(to_engine), reader, writer)


async def _receive(connection: _Connection) -> FromEngine | None:
    """The process's next message; None where its end of the socket is closed: it ended, or was killed. Raises ValueError."""
    try:
        frame = await read_frame(connection.reader)
    except (asyncio.IncompleteReadError, OSError):
        return None
    message: FromEngine = connection.decoder.decode(frame)
    return message


async def _stop(connection: _Connection) -> None:
    """Close the sockets, which ends the process; kill it where it does not. Clears its leftovers away."""
    connection.sender.close()
    connection.writer.close()
    try:
        await asyncio.wait_for(connection.process.wait(), EXIT_TIMEOUT_S)
    except TimeoutError:
        connection.process.kill()
        await connection.process.wait()
    connection.leftovers.close()
