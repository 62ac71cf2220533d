"""One writer at a time: a lease that is renewed while its holder works, and ends soon after its holder's server does."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from vlm_server.finishing import finished
from vlm_server.sessions.store import RecordId, RecordStore, StoreError

logger = logging.getLogger(__name__)


class RecordBusyError(Exception):
    """Another writer has the lease."""


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    lifetime_s: float = 10.0  # a server that dies blocks its records for at most as long
    renewal_s: float = 1.0  # between two renewals; a lease that is revoked elsewhere is noticed as soon


@asynccontextmanager
async def leased(store: RecordStore, record_id: RecordId, *, times: LeaseTimes, on_lost: Callable[[], None]) -> AsyncIterator[str]:
    """The token of the lease, held until the block ends. `on_lost` is called, once, where it was lost before.

    Raises RecordBusyError, or StoreError.
    """
    token = secrets.token_hex(16)
    is_over = asyncio.Event()
    renewal: asyncio.Task[None] | None = None
    try:
        if not await store.acquire(record_id, token, lifetime_s=times.lifetime_s):
            raise RecordBusyError
        renewal = asyncio.create_task(_renew(store, record_id, token, times, on_lost, is_over))
        yield token
    finally:  # also where the acquisition was cancelled: it may have gone through
        is_over.set()
        await finished(_give_back(store, record_id, token, renewal))  # a turn can be cancelled twice: from elsewhere, and by its client


async def _give_back(store: RecordStore, record_id: RecordId, token: str, renewal: asyncio.Task[None] | None) -> None:
    try:
        if renewal is not None:
            await renewal  # one that is under way would take the release for a loss
    finally:
        try:
            await store.release(record_id, token)
        except StoreError as error:
            logger.warning("a lease could not be given back and will end by itself: %s", error)


async def _renew(
    store: RecordStore, record_id: RecordId, token: str, times: LeaseTimes, on_lost: Callable[[], None], is_over: asyncio.Event
) -> None:
    """Until `is_over`. Told and not cancelled: a store's client may lose a cancellation that comes in the middle of a command."""
    while not await _is_set_within(is_over, times.renewal_s):
        try:
            is_held = await store.renew(record_id, token, lifetime_s=times.lifetime_s)
        except StoreError as error:
            logger.warning("a lease could not be renewed: %s", error)
            continue
        if not is_held:
            on_lost()
            return


async def _is_set_within(event: asyncio.Event, limit_s: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            await event.wait()
    return event.is_set()
