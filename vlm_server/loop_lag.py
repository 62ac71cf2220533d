"""How late the event loop runs what is due: for so long something kept it from every client at once. Knows nothing of what that was."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

INTERVAL_S = 0.05  # twenty looks a second cost nothing, and miss little: what blocks for longer than this is always seen


@contextlib.asynccontextmanager
async def watching_lag(observe: Callable[[float], None]) -> AsyncIterator[None]:
    """`watch_lag` for as long as the block lasts."""
    watch = asyncio.create_task(watch_lag(observe))
    try:
        yield
    finally:
        watch.cancel()
        await asyncio.wait((watch,))


async def watch_lag(
    observe: Callable[[float], None],
    *,
    now_s: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Tells `observe` each look's lateness in seconds, until it is cancelled."""
    while True:
        due_s = now_s() + INTERVAL_S
        await sleep(INTERVAL_S)
        observe(max(0.0, now_s() - due_s))
