"""Equal work that is asked for at the same time is done once. Keeps no result after it was delivered."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class _Flight(Generic[Value]):
    def __init__(self, work: Coroutine[Any, Any, Value]) -> None:
        self.task = asyncio.create_task(work)
        self.num_waiting = 0


class SingleFlight(Generic[Key, Value]):
    """Callers of one key share one run. A caller that is cancelled leaves the run to the others; the last one ends it."""

    def __init__(self) -> None:
        self._flights: dict[Key, _Flight[Value]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def run(self, key: Key, work: Callable[[], Coroutine[Any, Any, Value]]) -> Value:
        """The result of `work()`, or of the run of this key that is under way; raises what that run raised."""
        async with self.hold(key, work) as value:
            return value

    @asynccontextmanager
    async def hold(
        self, key: Key, work: Callable[[], Coroutine[Any, Any, Value]], *, let_go: Callable[[Value], None] = lambda value: None
    ) -> AsyncIterator[Value]:
        """As `run`, for values that must be given back: by `let_go`, when the last caller has left its block."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(work())
            flight.task.add_done_callback(lambda task: self._forget(key, flight))  # what is done is nothing that later callers join
        flight.num_waiting += 1
        try:
            await asyncio.wait((flight.task,))  # a caller's cancellation does not reach the task
            yield flight.task.result()
        finally:
            flight.num_waiting -= 1
            if flight.num_waiting == 0:
                self._forget(key, flight)
                _end(flight.task, let_go)

    def _forget(self, key: Key, flight: _Flight[Value]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


def _end(task: "asyncio.Task[Value]", let_go: Callable[[Value], None]) -> None:
    """Cancels a run, and gives its value back where it has one. Nobody is left to hear of an error."""
    if not task.done():
        task.cancel()
        task.add_done_callback(lambda done: _end(done, let_go))
    elif not task.cancelled() and task.exception() is None:
        let_go(task.result())
