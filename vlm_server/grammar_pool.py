"""The server's side of reading grammars: two worker processes that can be killed, and a client has one of them at most.

Knows nothing of fields; what is wrong with a grammar is said of the grammar.
"""

import asyncio
from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np

from engine.guided import GrammarError
from vision.budget import Budget, Reservation
from vision.frames import Frame
from vision.media_budgets import owner_or
from vision.shared_array import SharedArray
from vision.workers import WorkerEndedError, WorkerError, WorkerPool, WorkerTimeoutError
from vlm_server.errors import ApiError
from vlm_server.grammar_worker import GrammarLimits

NUM_WORKERS = 2  # as many grammars are read at once, one of each client
WAIT_S = 20.0  # for a free worker; and for its answer, on however busy a machine
_START_TIMEOUT_S = 60.0


class GrammarPool:
    """`open()` before use, `close()` after."""

    def __init__(self, limits: GrammarLimits | None = None) -> None:
        self._limits = limits or GrammarLimits()
        self._places = Budget("grammars to be read", NUM_WORKERS, wait_s=WAIT_S)
        self._pool = WorkerPool(
            "vlm_server.grammar_worker",
            num_workers=NUM_WORKERS,
            settings=msgspec.msgpack.encode(self._limits),
            timeout_s=WAIT_S,
            start_timeout_s=_START_TIMEOUT_S,
            abandon_s=WAIT_S,
        )

    async def open(self) -> None:
        """Raises WorkerError."""
        await self._pool.open_confined("grammar")

    async def close(self) -> None:
        await self._pool.close()

    @property
    def process_ids(self) -> list[int]:
        return self._pool.process_ids

    async def read(self, write: Callable[[], str]) -> str:
        """The grammar that `write` writes in a thread, once it is seen that the engine can follow it.

        Raises GrammarError, what `write` raises, BudgetFullError, or ApiError 503. A grammar that nobody waits for any more keeps its
        place while it is read.
        """
        place = await self._places.reserve(1, owner_or(""))
        job = asyncio.create_task(self._written(write))
        job.add_done_callback(partial(_release, place))
        return await asyncio.shield(job)

    async def _written(self, write: Callable[[], str]) -> str:
        grammar = await asyncio.to_thread(write)
        if complaint := await self._complaint(grammar):
            raise GrammarError(complaint)
        return grammar

    async def _complaint(self, grammar: str) -> str | None:
        data = SharedArray.copy_of(np.frombuffer(grammar.encode(), np.uint8))
        try:
            reply = await self._pool.call(Frame(arrays={"grammar": data}))
            return msgspec.msgpack.decode(reply.body, type=str | None)
        except (WorkerEndedError, WorkerTimeoutError):
            limits = f"{self._limits.cpu_s:g} s of processor time or {self._limits.memory_bytes >> 20} MiB"
            return f"it is too large to be followed: reading it takes more than {limits}"
        except (WorkerError, msgspec.MsgspecError) as error:
            raise ApiError(503, "grammar_unavailable", f"grammars cannot be read now: {error}; try again") from error


def _release(place: Reservation, job: "asyncio.Task[str]") -> None:
    place.release()
    if not job.cancelled():
        job.exception()  # seen, also where nobody waits for it
