"""Which store of records a server's settings name: a SQLite file, Redis, or memory."""

import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from vlm_server.sessions.sqlite_store import IN_MEMORY, SqliteStore
from vlm_server.sessions.store import RecordStore, StoreError

logger = logging.getLogger(__name__)

AUTO, MEMORY = "auto", "memory"
REDIS_SCHEMES = ("redis://", "rediss://", "unix://")

OpenStore = Callable[[str], AbstractAsyncContextManager[RecordStore]]


@asynccontextmanager
async def open_store(where: str) -> AsyncIterator[RecordStore]:
    """`where`: a file, a Redis URL, `memory`, or `auto`. Raises StoreError; `auto` never does."""
    store = await _opened(where)
    try:
        yield store
    finally:
        await store.close()


def default_path() -> Path:
    """In the user's state folder: `$XDG_STATE_HOME/vlm-server` or `~/.local/state/vlm-server`."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "vlm-server" / "sessions.sqlite3"


async def _opened(where: str) -> RecordStore:
    if where == AUTO:
        return await _default()
    if where == MEMORY:
        return await SqliteStore.open(IN_MEMORY)
    if not where.startswith(REDIS_SCHEMES):
        return await SqliteStore.open(where)
    try:
        from vlm_server.sessions.redis_store import RedisStore
    except ImportError:
        raise StoreError("--session-store: Redis needs the package redis: pip install 'vlm-server[redis]'") from None
    return await RedisStore.open(where)


async def _default() -> RecordStore:
    """A machine without a home that can be written to serves nonetheless."""
    try:
        return await SqliteStore.open(default_path())
    except StoreError as error:
        logger.warning("%s; interactive sessions and uploaded files are kept in memory and end with this server (--session-store)", error)
        return await SqliteStore.open(IN_MEMORY)
