"""How many downloads run from one host at a time. Knows nothing of HTTP."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class HostSlots:
    """At most `limit` holders per host; others wait in order. A host that nobody uses takes no memory."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._slots: dict[str, tuple[asyncio.Semaphore, int]] = {}  # with the number of those who hold one or wait

    def __len__(self) -> int:
        return len(self._slots)

    @asynccontextmanager
    async def hold(self, host: str) -> AsyncIterator[None]:
        semaphore, num_users = self._slots.get(host) or (asyncio.Semaphore(self._limit), 0)
        self._slots[host] = semaphore, num_users + 1
        try:
            async with semaphore:
                yield
        finally:
            _, num_users = self._slots[host]
            if num_users == 1:
                del self._slots[host]
            else:
                self._slots[host] = semaphore, num_users - 1
