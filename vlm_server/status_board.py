"""The server's numbers of this moment and of the last minutes, for the status page.

Takes a sample every few seconds, whether or not somebody looks, so that a page that is opened has something to draw; asks the engine at
most twice a second, however many look. Counters are given as they are: who reads two samples knows the rates. Knows nothing of HTTP.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from engine.request import EngineError, EngineStats
from vision.service import VisionStats
from vision.single_flight import SingleFlight
from vlm_server.backend import Engine
from vlm_server.stage_totals import StageTotal, StageTotals

logger = logging.getLogger(__name__)

INTERVAL_S = 3.0
HISTORY_S = 300.0
FRESH_S = 0.5  # a sample that is younger is used again
ANSWER_LIMIT_S = 1.0  # an engine in a long step is not waited for


@dataclass(frozen=True, slots=True)
class Sample:
    at_s: float  # since the server was started
    engine: EngineStats | None  # None: it did not answer
    vision: VisionStats
    stages: Mapping[str, StageTotal]


class StatusBoard:
    """`sampling` opens and closes it; one event loop owns it."""

    def __init__(self, totals: StageTotals, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._started_s = now_s()
        self._totals = totals
        self._engine: Engine | None = None
        self._vision_stats: Callable[[], VisionStats] = VisionStats
        self._flight: SingleFlight[None, Sample] = SingleFlight()
        self._newest: Sample | None = None
        self._history: deque[Sample] = deque(maxlen=round(HISTORY_S / INTERVAL_S))
        self._answered_s = 0.0

    @contextlib.asynccontextmanager
    async def sampling(self, engine: Engine, vision_stats: Callable[[], VisionStats]) -> AsyncIterator[None]:
        self._engine, self._vision_stats = engine, vision_stats
        task = asyncio.create_task(self._keep_sampling())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    @property
    def uptime_s(self) -> float:
        return self._now_s() - self._started_s

    @property
    def silence_s(self) -> float:
        """Since the engine answered the last time."""
        return self.uptime_s - self._answered_s

    @property
    def history(self) -> list[Sample]:
        """The oldest first."""
        return list(self._history)

    async def sample(self) -> Sample:
        """Of this moment, or of half a second ago."""
        if self._newest is not None and self.uptime_s - self._newest.at_s < FRESH_S:
            return self._newest
        return await self._flight.run(None, self._take)

    async def _take(self) -> Sample:
        engine = await self._engine_stats()
        self._newest = Sample(self.uptime_s, engine, self._vision_stats(), self._totals.now())
        if engine is not None:
            self._answered_s = self._newest.at_s
        return self._newest

    async def _engine_stats(self) -> EngineStats | None:
        assert self._engine is not None, "the status board is not open"
        try:
            async with asyncio.timeout(ANSWER_LIMIT_S):
                return await self._engine.stats()
        except (EngineError, TimeoutError):
            return None

    async def _keep_sampling(self) -> None:
        while True:
            try:
                self._history.append(await self.sample())
            except Exception:
                logger.exception("no sample for the status page could be taken")
            await asyncio.sleep(INTERVAL_S)
