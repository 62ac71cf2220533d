"""Whether this server can take requests: the engine answers, nobody told it to stop, and a probe went through the whole pipeline.

The first probe begins with the server, another one with each new life of the engine, one more after a failure, and any that a client asks
for; there is one at a time, and never one right after another. Knows nothing of HTTP and of what a probe does.
"""

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

logger = logging.getLogger(__name__)

MIN_INTERVAL_S = 10.0  # from the end of a probe to the next one, whoever asks for it

DRAINING = "draining"  # beside the stages of a probe: what is missing
ENGINE = "engine"
QUEUE = "queue"
FIRST_PROBE = "first_probe"

_READY = "ready"  # of the engine's states


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """How far a probe came, and what each stage took."""

    stages_s: Mapping[str, float] = field(default_factory=dict)
    failed_stage: str | None = None
    message: str = ""  # why it failed; safe to show to everybody
    is_busy: bool = False  # it was not let in, since others wait: that says nothing of the pipeline


Probe = Callable[[], Awaitable[ProbeReport]]


class WatchedEngine(Protocol):
    @property
    def state(self) -> str: ...

    @property
    def failure(self) -> str | None: ...

    @property
    def num_restarts(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The answer to `GET /health/ready`. stage: what is missing, None where nothing is."""

    message: str
    stage: str | None = None
    stages_s: Mapping[str, float] | None = None  # of the last probe
    age_s: float | None = None  # since it ended

    @property
    def is_ready(self) -> bool:
        return self.stage is None

    def body(self) -> dict[str, object]:
        probe = None
        if self.age_s is not None:
            stages_ms = {name: round(1000 * seconds, 1) for name, seconds in (self.stages_s or {}).items()}
            probe = {"age_s": round(self.age_s, 1), "stages_ms": stages_ms}
        return {"status": "ready" if self.is_ready else "not_ready", "message": self.message, "stage": self.stage, "probe": probe}


@dataclass(frozen=True, slots=True)
class _Ended:
    report: ProbeReport
    life: int  # of the engine: how often it had been started again
    at_s: float


class Readiness:
    """One server's. `watching` opens and closes it; one event loop owns it."""

    def __init__(self, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._engine: WatchedEngine | None = None
        self._probe: Probe | None = None
        self._running: asyncio.Task[ProbeReport] | None = None
        self._last: _Ended | None = None  # that says something of the pipeline
        self._ended_s = float("-inf")
        self._is_draining = False

    @contextlib.asynccontextmanager
    async def watching(self, engine: WatchedEngine, probe: Probe | None) -> AsyncIterator[None]:
        """Tries `probe` out from now on; None: an engine that is ready is enough."""
        self._engine, self._probe = engine, probe
        self.standing()
        try:
            yield
        finally:
            self._engine = self._probe = None
            if self._running is not None:
                self._running.cancel()
                await asyncio.gather(self._running, return_exceptions=True)

    def drain(self) -> None:
        """The server was told to stop: it is not ready any more."""
        self._is_draining = True

    def standing(self) -> Standing:
        """What is known now, at once. Begins a probe where nothing is known of this engine, or the last one failed a while ago."""
        known = self._known()
        if known is None or known.report.failed_stage is not None:
            self._begin()
        return self._standing()

    async def probed(self) -> Standing:
        """As `standing`, after a probe that is under way, or a new one unless the last one ended a moment ago."""
        self._begin()
        report = await asyncio.shield(self._running) if self._running is not None else None
        if report is not None and report.is_busy:
            return Standing(message=report.message, stage=QUEUE)
        return self._standing()

    def _standing(self) -> Standing:
        engine, known = self._engine, self._known()
        if self._is_draining:
            return Standing(message="the server is stopping: running requests finish, new ones are not taken", stage=DRAINING)
        if engine is None or engine.state != _READY:
            why = f": {engine.failure}" if engine is not None and engine.failure else ""
            return Standing(message=f"the engine is {'closed' if engine is None else str(engine.state)}{why}", stage=ENGINE)
        if self._probe is None:
            return Standing(message="the engine is ready")
        if known is None:
            return Standing(message="the first probe of the pipeline has not ended yet", stage=FIRST_PROBE)
        report = known.report
        message = report.message if report.failed_stage is not None else "the last probe went through the whole pipeline"
        return Standing(message=message, stage=report.failed_stage, stages_s=report.stages_s, age_s=self._now_s() - known.at_s)

    def _known(self) -> _Ended | None:
        """The last probe of this life of the engine."""
        is_of_this_life = self._last is not None and self._engine is not None and self._last.life == self._engine.num_restarts
        return self._last if is_of_this_life else None

    def _begin(self) -> None:
        engine, probe = self._engine, self._probe
        if engine is None or probe is None or self._running is not None or self._is_draining or engine.state != _READY:
            return
        if self._last is not None and self._known() is None:
            self._ended_s = float("-inf")  # a new engine need not wait
            self._last = None
        if self._now_s() - self._ended_s < MIN_INTERVAL_S:
            return
        work = self._run(probe, engine.num_restarts)
        self._running = asyncio.create_task(work, context=contextvars.Context())  # nobody's quota is charged for it

    async def _run(self, probe: Probe, life: int) -> ProbeReport:
        try:
            report = await probe()
        except Exception:
            logger.exception("the probe of the pipeline failed in a way that it does not know")
            report = ProbeReport(failed_stage="probe", message="the probe failed; the server's log says why")
        finally:
            self._running, self._ended_s = None, self._now_s()
        if not report.is_busy or self._last is None:
            self._last = _Ended(report, life, self._ended_s)
        if report.failed_stage is not None:
            logger.error("the probe of the pipeline failed at %s: %s", report.failed_stage, report.message)
        return report
