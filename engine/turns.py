"""Whose turn it is: tenants in the waiting room, rows that share a step's prefill, requests that share the vision encoder.

One rule for rows and pictures: every other turn belongs to whoever came first, those between to whoever needs least. So a request is never
kept waiting by more than twice the work before it, and a small one is not kept waiting by a large one. Knows nothing of blocks or of time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


class TenantTurns:
    """Places in a waiting room in which tenants take turns, however many requests each has there.

    A request's place is fixed when it comes: behind its tenant's others, those that were let in too, and not before the place that was let
    in last. Places are start tags of fair queueing (Goyal, Vin and Cheng, 1996): who has a place is overtaken by no more than what each
    other tenant can put before it, and each of their requests takes a later place than the one before.
    """

    def __init__(self) -> None:
        self._last_begun = 0
        self._ends: dict[str, int] = {}  # by tenant: where the work ends that was let in, if that is beyond the last place

    def place(self, tenant: str, others: Iterable[tuple[int, int]]) -> int:
        """For a request that comes. others: place and cost of each request of the same tenant that waits."""
        ends = (place + cost for place, cost in others)
        return max(self._last_begun, self._ends.get(tenant, 0), *ends)

    def begun(self, tenant: str, place: int, cost: int) -> None:
        """A request with this place was let in."""
        self._last_begun = max(self._last_begun, place)
        self._ends[tenant] = max(self._ends.get(tenant, 0), place + cost)
        self._ends = {tenant: end for tenant, end in self._ends.items() if end > self._last_begun}


def by_turns(items: Sequence[Item], size: Callable[[Item], int], *, smallest_next: bool) -> Iterator[Item]:
    """Each item once: by turns the first one that is left and, beginning with it where `smallest_next`, the smallest one that is left."""
    queues = (iter(items), iter(sorted(items, key=size)))
    given: set[int] = set()
    while len(given) < len(items):
        item = next(item for item in queues[smallest_next] if id(item) not in given)
        given.add(id(item))
        yield item
        smallest_next = not smallest_next
