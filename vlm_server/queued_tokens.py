"""The engine as the routes see it, with a limit of the prompt tokens that wait in it: over it one waits briefly here, then is refused.

A prompt waits until its answer's first step. A request that had one prompt let in is not refused halfway: its others wait for their turns.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

from engine.request import Prompt, QueueFullError, SamplingParams, StepOutput
from vision.budget import Budget, BudgetFullError, Reservation
from vision.media_budgets import current_holding
from vlm_server.backend import Engine

QUEUED_TOKENS = "queued_tokens"


def bounded_queue(engine: Engine, budget: Budget) -> Engine:
    """budget: of prompt tokens."""
    return cast(Engine, _BoundedQueue(engine, budget))


class _BoundedQueue:
    """Has all that the engine has."""

    def __init__(self, engine: Engine, budget: Budget) -> None:
        self._engine = engine
        self._budget = budget

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, prompt: Prompt, params: SamplingParams, *, request_id: str) -> AsyncGenerator[StepOutput, None]:
        """Raises QueueFullError, before the engine hears of it, beside what the engine raises."""
        with await self._let_in(prompt) as waiting:
            try:
                async with aclosing(self._engine.generate(prompt, params, request_id=request_id)) as steps:
                    async for step in steps:
                        if not waiting.is_released:
                            waiting.release()
                            _give_pictures(prompt)
                        yield step
            except QueueFullError as error:
                raise QueueFullError(str(error), retry_after_s=self._retry_after_s(error, prompt)) from error

    async def _let_in(self, prompt: Prompt) -> Reservation:
        holding = current_holding()
        owner, is_patient = ("", False) if holding is None else (holding.owner, holding.is_admitted)
        try:
            waiting = await self._budget.reserve(len(prompt.token_ids), owner, is_patient=is_patient)
        except BudgetFullError as error:
            message = f"{self._budget.used} prompt tokens wait already, at most {self._budget.limit} may (--max-queued-tokens), and of one "
            message += f"client {self._budget.share}; try again later"
            raise QueueFullError(message, retry_after_s=error.retry_after_s) from None
        if holding is not None:
            holding.is_admitted = True
        return waiting

    def _retry_after_s(self, error: QueueFullError, prompt: Prompt) -> int:
        """Of the engine's own refusal: after so many tokens have begun as this prompt has, as far as is known how fast they do."""
        if not self._budget.is_measured:
            return error.retry_after_s
        return max(error.retry_after_s, self._budget.retry_after_s(len(prompt.token_ids)))


def _give_pictures(prompt: Prompt) -> None:
    holding = current_holding()
    if holding is not None:
        holding.give_arrays(image.content_hash for image in prompt.images)
