"""A store of records in one SQLite file, for one machine; in memory alone under the path `:memory:`.

The file holds conversations, so only its owner may read it, and what has ended is overwritten in it and in its journal soon after. All
work is done in one thread; several processes may share the file.
"""

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from vlm_server.sessions.store import LeaseLostError, Limits, Quota, RecordId, StoreError, StoreFullError

logger = logging.getLogger(__name__)

IN_MEMORY = ":memory:"
BUSY_TIMEOUT_S = 5.0  # for another process's write
TIMEOUT_S = 15.0  # for an operation and those before it, of which each may wait for another process
CHECKPOINT_DELAY_S = 1.0  # after something has ended: one checkpoint for many ends, and none for those that a client waits for
_CHECKPOINT_TIMEOUT_S = 0.1  # for which it holds up the store and other processes' writes; then it is tried again after the delay
_OPEN_POLL_S = 0.01  # of a file that another process is opening

_VERSION = 1  # of the tables; a file of another version is left alone
_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    namespace TEXT NOT NULL, tenant TEXT NOT NULL, key TEXT NOT NULL,
    value BLOB NOT NULL, written_s REAL NOT NULL, expires_s REAL NOT NULL,
    PRIMARY KEY (namespace, tenant, key)
);
CREATE INDEX IF NOT EXISTS records_by_end ON records (expires_s);
CREATE TABLE IF NOT EXISTS parts (
    namespace TEXT NOT NULL, tenant TEXT NOT NULL, key TEXT NOT NULL, name TEXT NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (namespace, tenant, key, name),
    FOREIGN KEY (namespace, tenant, key) REFERENCES records ON DELETE CASCADE
);
CREATE TABLE IF NOT EXISTS leases (
    namespace TEXT NOT NULL, tenant TEXT NOT NULL, key TEXT NOT NULL, token TEXT NOT NULL, expires_s REAL NOT NULL,
    PRIMARY KEY (namespace, tenant, key)
);
"""
_THIS = "namespace = ? AND tenant = ? AND key = ?"
_NUM_BYTES = (  # of one of `records`; SQLite reads no blob for its length
    "LENGTH(value) + (SELECT COALESCE(SUM(LENGTH(data)), 0) FROM parts WHERE "
    "parts.namespace = records.namespace AND parts.tenant = records.tenant AND parts.key = records.key)"
)

_READ, _WRITE = "BEGIN", "BEGIN IMMEDIATE"  # a read waits for no other process's write

Result = TypeVar("Result")


class SqliteStore:
    """See `RecordStore`. `clock`: Unix time, which processes that share the file must agree on."""

    def __init__(self, connection: sqlite3.Connection, thread: ThreadPoolExecutor, clock: Callable[[], float]) -> None:
        self._connection = connection
        self._thread = thread
        self._clock = clock
        self._holds_ended = True  # in the journal, maybe since a server that was killed; the thread's
        self._may_hold_ended = asyncio.Event()
        self._may_hold_ended.set()
        self._overwriting = asyncio.create_task(self._overwrite_ended())

    @classmethod
    async def open(cls, path: str | Path, *, clock: Callable[[], float] = time.time) -> "SqliteStore":
        """Makes the file, and its folder, where there is none. Raises StoreError."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="session-store")
        try:
            connection = await asyncio.get_running_loop().run_in_executor(thread, _connect, str(path))
        except (OSError, sqlite3.Error) as error:
            thread.shutdown()
            raise StoreError(f"the session store {path} cannot be opened: {error}") from error
        except BaseException:
            thread.shutdown()
            raise
        return cls(connection, thread, clock)

    async def close(self) -> None:
        self._overwriting.cancel()
        await asyncio.wait((self._overwriting,))
        await asyncio.get_running_loop().run_in_executor(self._thread, self._checkpoint)
        await asyncio.get_running_loop().run_in_executor(self._thread, self._connection.close)
        self._thread.shutdown()

    async def get(self, record_id: RecordId) -> bytes | None:
        query = f"SELECT value FROM records WHERE {_THIS} AND expires_s > ?"
        row = await self._run(lambda db: db.execute(query, (*_row(record_id), self._clock())).fetchone(), begin=_READ)
        return None if row is None else bytes(row[0])

    async def get_parts(self, record_id: RecordId, names: Collection[str]) -> dict[str, bytes]:
        query = f"SELECT data FROM parts JOIN records USING (namespace, tenant, key) WHERE {_THIS} AND name = ? AND expires_s > ?"

        def read(db: sqlite3.Connection) -> dict[str, bytes]:
            rows = {name: db.execute(query, (*_row(record_id), name, self._clock())).fetchone() for name in names}
            return {name: bytes(row[0]) for name, row in rows.items() if row is not None}

        return await self._run(read, begin=_READ)

    async def num_bytes(self, record_id: RecordId) -> int | None:
        query = f"SELECT {_NUM_BYTES} FROM records WHERE {_THIS} AND expires_s > ?"
        row = await self._run(lambda db: db.execute(query, (*_row(record_id), self._clock())).fetchone(), begin=_READ)
        return None if row is None else int(row[0])

    async def put(self, record_id: RecordId, value: bytes, *, parts: Mapping[str, bytes], limits: Limits, token: str | None = None) -> None:
        def write(db: sqlite3.Connection) -> None:
            now_s = self._clock()
            _require_lease(db, record_id, token, now_s)
            num_ended = _delete_ended(db, now_s)
            _write(db, record_id, value, parts, now_s, limits.ttl_s)
            self._holds_ended |= num_ended + _delete_surplus(db, record_id, limits) > 0

        await self._run_ending(write)

    async def add(self, record_id: RecordId, value: bytes, *, parts: Mapping[str, bytes], ttl_s: float, quota: Quota) -> None:
        def write(db: sqlite3.Connection) -> None:
            now_s = self._clock()
            self._holds_ended |= _delete_ended(db, now_s) > 0
            num_records, num_bytes = _held(db, record_id.namespace, record_id.tenant)
            quota.require(sum(map(len, parts.values())), num_records=num_records, num_bytes=num_bytes)
            _write(db, record_id, value, parts, now_s, ttl_s)

        await self._run_ending(write)

    async def values(self, namespace: str, tenant: str) -> dict[str, bytes]:
        query = "SELECT key, value FROM records WHERE namespace = ? AND tenant = ? AND expires_s > ?"
        rows = await self._run(lambda db: db.execute(query, (namespace, tenant, self._clock())).fetchall(), begin=_READ)
        return {key: bytes(value) for key, value in rows}

    async def delete(self, record_id: RecordId, *, token: str | None = None) -> None:
        def write(db: sqlite3.Connection) -> None:
            _require_lease(db, record_id, token, self._clock())
            self._holds_ended |= db.execute(f"DELETE FROM records WHERE {_THIS}", _row(record_id)).rowcount > 0

        await self._run_ending(write)

    async def count(self, namespace: str) -> int:
        query = "SELECT COUNT(*) FROM records WHERE namespace = ? AND expires_s > ?"
        (number,) = await self._run(lambda db: db.execute(query, (namespace, self._clock())).fetchone(), begin=_READ)
        return int(number)

    async def acquire(self, record_id: RecordId, token: str, *, lifetime_s: float) -> bool:
        def write(db: sqlite3.Connection) -> bool:
            now_s = self._clock()
            db.execute("DELETE FROM leases WHERE expires_s <= ?", (now_s,))
            row = (*_row(record_id), token, now_s + lifetime_s)
            return db.execute("INSERT OR IGNORE INTO leases VALUES (?, ?, ?, ?, ?)", row).rowcount == 1

        return await self._run(write)

    async def renew(self, record_id: RecordId, token: str, *, lifetime_s: float) -> bool:
        query = f"UPDATE leases SET expires_s = ? WHERE {_THIS} AND token = ?"  # one that has ended too, which nobody has taken since

        def write(db: sqlite3.Connection) -> bool:
            return db.execute(query, (self._clock() + lifetime_s, *_row(record_id), token)).rowcount == 1

        return await self._run(write)

    async def release(self, record_id: RecordId, token: str) -> None:
        await self._run(lambda db: db.execute(f"DELETE FROM leases WHERE {_THIS} AND token = ?", (*_row(record_id), token)))

    async def revoke(self, record_id: RecordId) -> None:
        await self._run(lambda db: db.execute(f"DELETE FROM leases WHERE {_THIS}", _row(record_id)))

    async def _run_ending(self, work: Callable[[sqlite3.Connection], None]) -> None:
        """As `_run`, of work that may end records: it sets `_holds_ended` where it does."""
        try:
            await self._run(work)
        finally:  # also where the caller is cancelled and the work goes on
            self._may_hold_ended.set()

    async def _overwrite_ended(self) -> None:
        """Until it is cancelled."""
        while True:
            await self._may_hold_ended.wait()
            self._may_hold_ended.clear()
            await asyncio.sleep(CHECKPOINT_DELAY_S)
            if not await asyncio.get_running_loop().run_in_executor(self._thread, self._checkpoint):
                self._may_hold_ended.set()

    def _checkpoint(self) -> bool:
        """Empties the journal if it holds what has ended. False where another process uses it, which may pass."""
        if not self._holds_ended:
            return True
        try:
            self._holds_ended = not _empty_journal(self._connection)
        except sqlite3.Error as error:  # tried again when something ends
            logger.warning("what has ended stays in the session store's journal: %s", error)
            return True
        return not self._holds_ended

    async def _run(self, work: Callable[[sqlite3.Connection], Result], *, begin: str = _WRITE) -> Result:
        """`work` as one transaction, in the store's thread; a caller that is cancelled does not end it once it has begun.

        What has not begun in time is not done, what is not done in time is undone.
        """
        deadline_s = time.monotonic() + TIMEOUT_S
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await loop.run_in_executor(self._thread, _transaction, self._connection, work, begin, deadline_s)
        except TimeoutError:
            logger.error("the session store was busy for %g s", TIMEOUT_S)
            raise StoreError("the session store is busy; try again") from None
        except sqlite3.Error as error:
            logger.error("the session store failed: %s", error)
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise StoreFullError from error
            raise StoreError("the session store failed; the server's log says why") from error


def _connect(path: str) -> sqlite3.Connection:
    if path != IN_MEMORY:
        path = os.path.expanduser(path)
        Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(descriptor, 0o600)  # also a file that was there; SQLite gives its journals the same mode
        finally:
            os.close(descriptor)
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    try:
        _prepare_in_turn(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare_in_turn(connection: sqlite3.Connection) -> None:
    """SQLite's own timeout does not cover the change to WAL, which fails at once where two servers open a new file together."""
    deadline_s = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            return _prepare(connection)
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() >= deadline_s:
                raise
        time.sleep(_OPEN_POLL_S)


def _is_busy(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY  # the low byte: there are kinds of it


def _prepare(connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version not in (0, _VERSION):
        raise sqlite3.DatabaseError(f"it has version {version} of the tables, this server writes version {_VERSION}")
    connection.execute("PRAGMA auto_vacuum = FULL")  # before anything is written, else it has no effect
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")  # some builds of SQLite have it so, others leave what was deleted in the file
    if version == 0:
        connection.executescript(f"{_SCHEMA} PRAGMA user_version = {_VERSION};")


def _transaction(connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], Result], begin: str, deadline_s: float) -> Result:
    """Raises TimeoutError where it is not done by the deadline, on the monotonic clock."""
    _set_busy_timeout(connection, min(BUSY_TIMEOUT_S, _left_s(deadline_s)))
    connection.execute(begin)
    try:
        result = work(connection)
        _left_s(deadline_s)  # its caller was told that it failed
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # some failures, a full disk among them, have ended it
            connection.execute("ROLLBACK")
        raise
    return result


def _left_s(deadline_s: float) -> float:
    """Raises TimeoutError where nothing is."""
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _set_busy_timeout(connection: sqlite3.Connection, timeout_s: float) -> None:
    connection.execute(f"PRAGMA busy_timeout = {round(timeout_s * 1000)}")


def _empty_journal(connection: sqlite3.Connection) -> bool:
    """Brings what the journal holds into the file, and cuts the journal. False where another process reads or writes just now."""
    _set_busy_timeout(connection, _CHECKPOINT_TIMEOUT_S)
    [(is_busy, *_)] = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return not is_busy


def _row(record_id: RecordId) -> tuple[str, str, str]:
    return record_id.namespace, record_id.tenant, record_id.key


def _require_lease(connection: sqlite3.Connection, record_id: RecordId, token: str | None, now_s: float) -> None:
    query = f"SELECT 1 FROM leases WHERE {_THIS} AND token = ? AND expires_s > ?"
    if token is not None and connection.execute(query, (*_row(record_id), token, now_s)).fetchone() is None:
        raise LeaseLostError


def _delete_ended(connection: sqlite3.Connection, now_s: float) -> int:
    """How many there were."""
    return connection.execute("DELETE FROM records WHERE expires_s <= ?", (now_s,)).rowcount


def _write(
    connection: sqlite3.Connection, record_id: RecordId, value: bytes, parts: Mapping[str, bytes], now_s: float, ttl_s: float
) -> None:
    """The value anew, and the parts that are not there yet."""
    connection.execute(
        "INSERT INTO records VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE "
        "SET value = excluded.value, written_s = excluded.written_s, expires_s = excluded.expires_s",
        (*_row(record_id), value, now_s, now_s + ttl_s),
    )
    rows = ((*_row(record_id), name, data) for name, data in parts.items())
    connection.executemany("INSERT OR IGNORE INTO parts VALUES (?, ?, ?, ?, ?)", rows)


def _held(connection: sqlite3.Connection, namespace: str, tenant: str) -> tuple[int, int]:
    """How many records the tenant has, and the bytes of all their parts, which are not read for it."""
    of_tenant = "WHERE namespace = ? AND tenant = ?"
    (num_records,) = connection.execute(f"SELECT COUNT(*) FROM records {of_tenant}", (namespace, tenant)).fetchone()
    (num_bytes,) = connection.execute(f"SELECT COALESCE(SUM(LENGTH(data)), 0) FROM parts {of_tenant}", (namespace, tenant)).fetchone()
    return num_records, num_bytes


def _delete_surplus(connection: sqlite3.Connection, record_id: RecordId, limits: Limits) -> int:
    """How many of the tenant's records there were too many; `record_id` is the newest."""
    query = f"SELECT rowid, {_NUM_BYTES} FROM records WHERE namespace = ? AND tenant = ? ORDER BY key = ? DESC, written_s DESC, rowid DESC"
    rows = connection.execute(query, _row(record_id)).fetchall()
    num_kept = limits.num_kept([num_bytes for _, num_bytes in rows])
    connection.executemany("DELETE FROM records WHERE rowid = ?", [(rowid,) for rowid, _ in rows[num_kept:]])
    return len(rows) - num_kept
