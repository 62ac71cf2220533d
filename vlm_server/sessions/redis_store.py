"""A store of records in Redis, for several servers.

A record is one hash (its value, and a field per part) that Redis itself ends in time; a lease is a key with a lifetime; beside them, per
tenant, a sorted set of its records by their ends, and a hash with their sizes (of added ones the parts', which
are what a quota counts). Writes that depend on a lease or a quota are transactions that fail where it changes.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Any

from redis import asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError, WatchError

from vlm_server.sessions.store import LeaseLostError, Limits, Quota, RecordId, StoreError, StoreFullError

logger = logging.getLogger(__name__)

TIMEOUT_S = 5.0  # for Redis to be reached, for one of these connections to be free, to answer, and for earlier additions to be done
MAX_CONNECTIONS = 64  # operations at once; others wait
MAX_RETRIES = 1  # of a command whose connection turns out to be closed: Redis was restarted; one that does not answer is not asked again
MAX_TRIES = 20  # of a transaction that others disturb
_MAX_PAUSE_S = 0.05  # between two tries; drawn, so that two servers do not go on disturbing each other

_NO_DISK = "MISCONF"  # how Redis refuses to write while it cannot save: its own disk is full

_VALUE = b"value"
_PART = b"part:"


class RedisStore:
    """See `RecordStore`."""

    def __init__(self, client: "redis.Redis", *, prefix: str = "vlm-server") -> None:
        self._redis = client
        self._prefix = prefix
        self._adding = asyncio.Lock()  # additions here take turns, so that only other servers disturb them

    @classmethod
    async def open(cls, url: str) -> "RedisStore":
        """Raises StoreError where `url` leads to no Redis."""
        try:
            retry = Retry(NoBackoff(), MAX_RETRIES, supported_errors=(RedisConnectionError,))
            pool = redis.BlockingConnectionPool.from_url(
                url,
                max_connections=MAX_CONNECTIONS,
                timeout=TIMEOUT_S,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                retry=retry,
            )
            client = redis.Redis.from_pool(pool)
        except (ValueError, RedisError) as error:
            raise StoreError(f"the session store's address is not valid: {error}") from error
        store = cls(client)
        try:
            await client.ping()
        except BaseException as error:
            await store.close()
            if isinstance(error, RedisError):
                raise StoreError(f"the session store failed: {error}") from error
            raise
        return store

    async def close(self) -> None:
        await self._redis.aclose()

    async def get(self, record_id: RecordId) -> bytes | None:
        async with _translated():
            value = await self._redis.hget(self._key("record", record_id), _VALUE)
        return None if value is None else bytes(value)

    async def get_parts(self, record_id: RecordId, names: Collection[str]) -> dict[str, bytes]:
        if not names:
            return {}
        async with _translated():
            found = await self._redis.hmget(self._key("record", record_id), [_PART + name.encode() for name in names])
        return {name: bytes(data) for name, data in zip(names, found, strict=True) if data is not None}

    async def num_bytes(self, record_id: RecordId) -> int | None:
        async with _translated():
            sizes = await self._field_sizes(record_id)
        return sum(sizes.values()) if sizes else None

    async def put(self, record_id: RecordId, value: bytes, *, parts: Mapping[str, bytes], limits: Limits, token: str | None = None) -> None:
        record, index, sizes = self._key("record", record_id), self._index(record_id), self._sizes(record_id)

        async def write(pipe: Any) -> None:
            await pipe.watch(record)  # not the index, which every write changes: the next one ends what two at once leave too many
            known = await self._field_sizes(record_id)
            new = {name: data for name, data in ((_PART + name.encode(), data) for name, data in parts.items()) if name not in known}
            num_bytes = sum((known | {name: len(data) for name, data in new.items()} | {_VALUE: len(value)}).values())
            ends_s = await _ends_s(pipe, index)
            now_s = time.time()
            surplus = await _surplus(pipe, ends_s, sizes, record_id.key.encode(), num_bytes, limits)
            pipe.multi()
            pipe.hset(record, mapping={_VALUE: value, **new})
            pipe.pexpire(record, _milliseconds(limits.ttl_s))
            pipe.zadd(index, {record_id.key: now_s + limits.ttl_s})
            pipe.hset(sizes, record_id.key, num_bytes)
            for name in (index, sizes):
                pipe.pexpire(name, _lifetime_ms(ends_s, limits.ttl_s, now_s))
            pipe.sadd(self._tenants(record_id.namespace), record_id.tenant)
            for key in surplus:
                self._forget(pipe, RecordId(record_id.namespace, record_id.tenant, key.decode()))

        await self._transaction(record_id, token, write)

    async def add(self, record_id: RecordId, value: bytes, *, parts: Mapping[str, bytes], ttl_s: float, quota: Quota) -> None:
        record, index, sizes = self._key("record", record_id), self._index(record_id), self._sizes(record_id)
        num_bytes = sum(map(len, parts.values()))

        async def write(pipe: Any) -> None:
            await pipe.watch(index)  # changes with every size
            now_s = time.time()
            ends_s = await _ends_s(pipe, index)
            size_of = await pipe.hgetall(sizes)
            ended = {key for key, end_s in ends_s.items() if end_s <= now_s}
            held = [int(size_of.get(key, 0)) for key in ends_s if key not in ended]
            quota.require(num_bytes, num_records=len(held), num_bytes=sum(held))
            pipe.multi()
            pipe.hset(record, mapping={_VALUE: value, **{_PART + name.encode(): data for name, data in parts.items()}})
            pipe.pexpire(record, _milliseconds(ttl_s))
            for key in ended:
                self._forget(pipe, RecordId(record_id.namespace, record_id.tenant, key.decode()))
            pipe.zadd(index, {record_id.key: now_s + ttl_s})
            pipe.hset(sizes, record_id.key, num_bytes)
            for name in (index, sizes):
                pipe.pexpire(name, _lifetime_ms(ends_s, ttl_s, now_s))
            pipe.sadd(self._tenants(record_id.namespace), record_id.tenant)

        async with self._turn_to_add():
            await self._transaction(record_id, None, write)

    async def values(self, namespace: str, tenant: str) -> dict[str, bytes]:
        async with _translated():
            keys = await self._redis.zrangebyscore(self._index(RecordId(namespace, tenant, "")), f"({time.time()}", "+inf")
            async with self._redis.pipeline(transaction=False) as pipe:
                for key in keys:
                    pipe.hget(self._key("record", RecordId(namespace, tenant, key.decode())), _VALUE)
                values = await pipe.execute()
        return {key.decode(): bytes(value) for key, value in zip(keys, values, strict=True) if value is not None}

    async def delete(self, record_id: RecordId, *, token: str | None = None) -> None:
        async def write(pipe: Any) -> None:
            pipe.multi()
            self._forget(pipe, record_id)

        await self._transaction(record_id, token, write)

    async def count(self, namespace: str) -> int:
        async with _translated():
            tenants = await self._redis.smembers(self._tenants(namespace))
            counts = [
                await self._redis.zcount(self._index(RecordId(namespace, tenant.decode(), "")), f"({time.time()}", "+inf")
                for tenant in tenants
            ]
        return sum(map(int, counts))

    async def acquire(self, record_id: RecordId, token: str, *, lifetime_s: float) -> bool:
        async with _translated():
            return bool(await self._redis.set(self._key("lease", record_id), token, nx=True, px=round(lifetime_s * 1000)))

    async def renew(self, record_id: RecordId, token: str, *, lifetime_s: float) -> bool:
        async def write(pipe: Any) -> None:
            pipe.multi()
            pipe.pexpire(self._key("lease", record_id), round(lifetime_s * 1000))

        return await self._if_held(record_id, token, write)

    async def release(self, record_id: RecordId, token: str) -> None:
        async def write(pipe: Any) -> None:
            pipe.multi()
            pipe.delete(self._key("lease", record_id))

        await self._if_held(record_id, token, write)

    async def revoke(self, record_id: RecordId) -> None:
        async with _translated():
            await self._redis.delete(self._key("lease", record_id))

    @asynccontextmanager
    async def _turn_to_add(self) -> AsyncIterator[None]:
        """Raises StoreError where those before take too long: where Redis hangs, each waits for it in turn."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._adding.acquire()
        except TimeoutError:
            raise StoreError("the session store is busy; try again") from None
        try:
            yield
        finally:
            self._adding.release()

    async def _field_sizes(self, record_id: RecordId) -> dict[bytes, int]:
        """Bytes of a record's value and parts; empty where there is none."""
        record = self._key("record", record_id)
        names = await self._redis.hkeys(record)
        async with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hstrlen(record, name)
            return dict(zip(names, map(int, await pipe.execute()), strict=True))

    def _forget(self, pipe: Any, record_id: RecordId) -> None:
        pipe.delete(self._key("record", record_id))
        pipe.zrem(self._index(record_id), record_id.key)
        pipe.hdel(self._sizes(record_id), record_id.key)

    async def _if_held(self, record_id: RecordId, token: str, write: Callable[[Any], Awaitable[None]]) -> bool:
        try:
            await self._transaction(record_id, token, write)
        except LeaseLostError:
            return False
        return True

    async def _transaction(self, record_id: RecordId, token: str | None, write: Callable[[Any], Awaitable[None]]) -> None:
        """`write` reads, calls `multi()` and queues its commands; nothing is done unless the lease held until the end."""
        lease = self._key("lease", record_id)
        async with _translated():
            for _ in range(MAX_TRIES):
                async with self._redis.pipeline(transaction=True) as pipe:
                    await pipe.watch(lease)
                    if token is not None and await pipe.get(lease) != token.encode():
                        raise LeaseLostError
                    await write(pipe)
                    try:
                        await pipe.execute()
                    except WatchError:
                        await asyncio.sleep(random.uniform(0, _MAX_PAUSE_S))
                        continue
                    return
        raise StoreError(f"the session store was busy at each of {MAX_TRIES} tries")

    def _key(self, kind: str, record_id: RecordId) -> str:
        return f"{self._prefix}:{record_id.namespace}:{kind}:{record_id.tenant}:{record_id.key}"

    def _index(self, record_id: RecordId) -> str:
        return f"{self._prefix}:{record_id.namespace}:index:{record_id.tenant}"

    def _sizes(self, record_id: RecordId) -> str:
        return f"{self._prefix}:{record_id.namespace}:sizes:{record_id.tenant}"

    def _tenants(self, namespace: str) -> str:
        return f"{self._prefix}:{namespace}:tenants"


def _milliseconds(seconds: float) -> int:
    """As Redis takes a lifetime, which is never none."""
    return max(1, round(seconds * 1000))


def _lifetime_ms(ends_s: Mapping[bytes, float], ttl_s: float, now_s: float) -> int:
    """Of an index: it stays as long as any of its records, also beside a new one that ends sooner."""
    return _milliseconds(max([now_s + ttl_s, *ends_s.values()]) - now_s)


async def _ends_s(pipe: Any, index: str) -> dict[bytes, float]:
    """Of a tenant's records, by their keys, the soonest first; some may have ended."""
    return dict(await pipe.zrange(index, 0, -1, withscores=True))


async def _surplus(pipe: Any, ends_s: dict[bytes, float], sizes: str, key: bytes, num_bytes: int, limits: Limits) -> list[bytes]:
    """The tenant's records that have ended, and its oldest ones beyond the limits once `key` is written with so many bytes."""
    now_s, size_of = time.time(), await pipe.hgetall(sizes)
    others = [other for other in reversed(ends_s) if other != key]
    newest = [other for other in others if ends_s[other] > now_s]
    ended = [other for other in others if ends_s[other] <= now_s]
    num_kept = limits.num_kept([num_bytes, *(int(size_of.get(other, 0)) for other in newest)])
    return [*ended, *newest[num_kept - 1 :]]


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    """What Redis says, its address with it, is for the log alone."""
    try:
        yield
    except RedisError as error:
        logger.error("the session store failed: %s", error)
        if isinstance(error, OutOfMemoryError) or (isinstance(error, ResponseError) and _NO_DISK in str(error)):
            raise StoreFullError from error
        raise StoreError("the session store does not answer; try again") from error
