"""The engine as the routes see it: as it is, but what it generates is charged to the request's quota."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

from engine.request import Prompt, SamplingParams, StepOutput
from vlm_server.backend import Engine
from vlm_server.metering import Meter, current_meter


def metered_engine(engine: Engine) -> Engine:
    return cast(Engine, _MeteredEngine(engine))


class _MeteredEngine:
    """Has all that the engine has."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompt: Prompt, params: SamplingParams, *, request_id: str) -> AsyncGenerator[StepOutput, None]:
        """Raises QuotaExceededError, before the engine hears of it, beside what the engine raises."""
        steps = self._engine.generate(prompt, params, request_id=request_id)
        meter = current_meter()
        return steps if meter is None else _charged(steps, prompt, meter)


async def _charged(steps: AsyncGenerator[StepOutput, None], prompt: Prompt, meter: Meter) -> AsyncGenerator[StepOutput, None]:
    with meter.answer(prompt) as answer:
        async with aclosing(steps):
            async for step in steps:
                answer.charge_step(len(step.token_ids))
                yield step
