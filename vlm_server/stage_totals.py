"""What the engine's stages took in sum, for all requests: queue, encode and prefill per request, decode per token.

Listens to the engine's answers as they pass, and changes nothing of them. Knows nothing of HTTP and of who reads the sums.
"""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

from engine.request import Prompt, SamplingParams, StepOutput
from vlm_server.backend import Engine

DECODE = "decode"
STAGES = ("queue", "encode", "prefill", DECODE)


@dataclass(frozen=True, slots=True)
class StageTotal:
    num: int = 0
    time_s: float = 0.0


class StageTotals:
    """Since the start. `now_s`: a clock that never goes back."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self.now_s = now_s
        self._totals = dict.fromkeys(STAGES, StageTotal())

    def add(self, stage: str, time_s: float, *, num: int = 1) -> None:
        total = self._totals.get(stage, StageTotal())
        self._totals[stage] = StageTotal(total.num + num, total.time_s + time_s)

    def now(self) -> dict[str, StageTotal]:
        return dict(self._totals)


def timed_engine(engine: Engine, totals: StageTotals) -> Engine:
    """The engine, whose answers are added to `totals`."""
    return cast(Engine, _TimedEngine(engine, totals))


class _TimedEngine:
    """Has all that the engine has."""

    def __init__(self, engine: Engine, totals: StageTotals) -> None:
        self._engine = engine
        self._totals = totals

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, prompt: Prompt, params: SamplingParams, *, request_id: str) -> AsyncGenerator[StepOutput, None]:
        totals, last_s = self._totals, None
        async with aclosing(self._engine.generate(prompt, params, request_id=request_id)) as steps:
            async for step in steps:
                now_s = totals.now_s()
                for stage, time_s in (step.timings_s or {}).items():
                    totals.add(stage, time_s)
                if last_s is not None and step.token_ids:
                    totals.add(DECODE, now_s - last_s, num=len(step.token_ids))
                last_s = now_s
                yield step
