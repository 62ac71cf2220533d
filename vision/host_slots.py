"""How many downloads run from one host at a time, and that none who asks for its pictures takes all of them. Knows nothing of HTTP."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from vision.budget import Budget


class HostSlots:
    """At most `limit` holders per host; others wait in order. A host that nobody uses takes no memory."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._slots: dict[str, tuple[Budget, int]] = {}  # with the number of those who hold one or wait

    def __len__(self) -> int:
        return len(self._slots)

    @asynccontextmanager
    async def hold(self, host: str, *, owner: str = "") -> AsyncIterator[None]:
        """A place of an owner, who leaves a quarter of them to others; it is the caller who limits the wait."""
        slots, num_users = self._slots.get(host) or (Budget("downloads of one host", self._limit, wait_s=None), 0)
        self._slots[host] = slots, num_users + 1
        try:
            with await slots.reserve(1, owner):
                yield
        finally:
            _, num_users = self._slots[host]
            if num_users == 1:
                del self._slots[host]
            else:
                self._slots[host] = slots, num_users - 1
