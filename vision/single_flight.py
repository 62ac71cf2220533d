"""Equal work that is asked for at the same time is done once. Keeps no result after it was delivered."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
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
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(work())
        flight.num_waiting += 1
        try:
            await asyncio.wait((flight.task,))  # a caller's cancellation does not reach the task
        finally:
            flight.num_waiting -= 1
            if flight.num_waiting == 0:
                self._end(key, flight)
        return flight.task.result()

    def _end(self, key: Key, flight: _Flight[Value]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not flight.task.done():
            flight.task.cancel()
            flight.task.add_done_callback(_ignore_result)


def _ignore_result(task: "asyncio.Task[Any]") -> None:
    """Nobody is left to hear of an error."""
    if not task.cancelled():
        task.exception()
