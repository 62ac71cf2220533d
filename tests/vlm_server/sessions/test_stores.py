"""Every kind of store keeps the same promises."""

import asyncio
import itertools
import random
import sqlite3
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_server.sessions import sqlite_store
from vlm_server.sessions.opening import default_path, open_store
from vlm_server.sessions.redis_store import MAX_CONNECTIONS, RedisStore
from vlm_server.sessions.sqlite_store import SqliteStore
from vlm_server.sessions.store import LeaseLostError, Limits, Quota, QuotaError, RecordId, RecordStore, StoreError

PLENTY = Limits(ttl_s=3600, max_records=100)
SECRET = b"what nobody is to find again"
A_MOMENT = Limits(ttl_s=0.001, max_records=100)


def a_record(key: str = "1", *, tenant: str | None = None) -> RecordId:
    """Of a tenant that no other test has."""
    return RecordId("test", tenant or uuid.uuid4().hex, key)


async def becomes(value: Any, read: Callable[[], Awaitable[Any]]) -> bool:
    deadline_s = time.monotonic() + 5
    while await read() != value:
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.001)
    return True


async def test_a_record_is_read_as_it_was_written(store: RecordStore) -> None:
    record = a_record()
    assert await store.get(record) is None

    await store.put(record, b"one", parts={"a": b"\0\r\n", "b": b""}, limits=PLENTY)
    await store.put(record, b"two", parts={"a": b"other", "c": b"C"}, limits=PLENTY)

    assert await store.get(record) == b"two"
    assert await store.get_parts(record, ["a", "b", "c", "d"]) == {"a": b"\0\r\n", "b": b"", "c": b"C"}
    assert await store.get_parts(record, []) == {}


async def test_a_record_tells_how_large_it_is(store: RecordStore) -> None:
    record = a_record()
    assert await store.num_bytes(record) is None

    await store.put(record, b"", parts={}, limits=PLENTY)
    assert await store.num_bytes(record) == 0
    await store.put(record, b"value", parts={"a": bytes(100_000), "b": b"\0"}, limits=PLENTY)
    await store.put(a_record("2", tenant=record.tenant), b"other", parts={"a": b"A"}, limits=PLENTY)
    assert await store.num_bytes(record) == 100_006

    await store.put(record, b"x", parts={}, limits=A_MOMENT)
    assert await becomes(None, lambda: store.num_bytes(record))


async def test_a_deleted_record_is_gone_with_its_parts(store: RecordStore) -> None:
    record = a_record()
    await store.put(record, b"x", parts={"a": b"A"}, limits=PLENTY)

    await store.delete(record)
    await store.delete(record)

    assert await store.get(record) is None
    assert await store.get_parts(record, ["a"]) == {}


async def test_tenants_namespaces_and_keys_do_not_see_each_other(store: RecordStore) -> None:
    mine = a_record()
    others = [RecordId("test", mine.tenant + "x", "1"), RecordId("other", mine.tenant, "1"), RecordId("test", mine.tenant, "2")]
    await store.put(mine, b"mine", parts={"a": b"A"}, limits=PLENTY)

    assert [await store.get(other) for other in others] == [None] * 3
    assert [await store.get_parts(other, ["a"]) for other in others] == [{}] * 3
    assert [await store.acquire(record, "t", lifetime_s=60) for record in (mine, *others)] == [True] * 4


async def test_a_record_ends_a_time_after_its_last_write(store: RecordStore) -> None:
    record = a_record()
    await store.put(record, b"x", parts={"a": b"old"}, limits=A_MOMENT)
    assert await becomes(None, lambda: store.get(record))
    assert await store.get_parts(record, ["a"]) == {}

    await store.put(record, b"y", parts={"a": b"new"}, limits=PLENTY)

    assert await store.get_parts(record, ["a"]) == {"a": b"new"}


async def test_the_tenants_longest_unwritten_records_make_room(store: RecordStore) -> None:
    tenant, neighbour = uuid.uuid4().hex, a_record()
    limits = Limits(ttl_s=3600, max_records=3)
    await store.put(neighbour, b"x", parts={}, limits=limits)
    for key in ("1", "2", "3", "1", "4"):
        await store.put(a_record(key, tenant=tenant), key.encode(), parts={"a": b"A"}, limits=limits)
        await asyncio.sleep(0.002)  # records of one millisecond have no order

    kept = [key for key in "1234" if await store.get(a_record(key, tenant=tenant)) is not None]

    assert kept == ["1", "3", "4"]
    assert await store.get_parts(a_record("2", tenant=tenant), ["a"]) == {}
    assert await store.get(neighbour) == b"x"


async def test_the_tenants_longest_unwritten_records_make_room_for_bytes(store: RecordStore) -> None:
    tenant, neighbour = uuid.uuid4().hex, a_record()
    limits = Limits(ttl_s=3600, max_records=100, max_bytes=100)
    await store.put(neighbour, bytes(90), parts={}, limits=limits)

    async def kept_after(key: str, num_bytes: int, **parts: int) -> list[str]:
        record = a_record(key, tenant=tenant)
        await store.put(record, bytes(num_bytes), parts={name: bytes(number) for name, number in parts.items()}, limits=limits)
        return [key for key in "12345" if await store.get(a_record(key, tenant=tenant)) is not None]

    assert await kept_after("1", 10, a=20) == ["1"]
    assert await kept_after("2", 30) == ["1", "2"]
    assert await kept_after("3", 40) == ["1", "2", "3"]
    assert await kept_after("1", 10, a=20) == ["1", "2", "3"], "a part that is there already does not count again"
    assert await kept_after("1", 11, b=9) == ["1", "3"], "its value, its new part and its old one are 40 bytes"
    assert await kept_after("4", 20) == ["1", "3", "4"]
    await store.delete(a_record("3", tenant=tenant))
    assert await kept_after("5", 40) == ["1", "4", "5"]
    assert await kept_after("2", 101) == ["2"], "the newest one stays, whatever its size"
    assert await store.get_parts(a_record("1", tenant=tenant), ["a", "b"]) == {}
    assert await kept_after("3", 1) == ["3"]
    assert await store.get(neighbour) == bytes(90)


async def test_bytes_of_records_that_have_ended_do_not_count(store: RecordStore) -> None:
    tenant = uuid.uuid4().hex
    limits = Limits(ttl_s=3600, max_records=100, max_bytes=100)
    await store.put(a_record("1", tenant=tenant), bytes(60), parts={}, limits=limits)
    await store.put(a_record("2", tenant=tenant), bytes(40), parts={}, limits=A_MOMENT)
    assert await becomes(None, lambda: store.get(a_record("2", tenant=tenant)))

    await store.put(a_record("3", tenant=tenant), bytes(40), parts={}, limits=limits)

    assert await store.num_bytes(a_record("1", tenant=tenant)) == 60


async def test_records_are_counted_over_all_tenants_until_they_end(store: RecordStore) -> None:
    namespace = uuid.uuid4().hex
    for tenant, key, limits in (("a", "1", PLENTY), ("b", "1", PLENTY), ("b", "2", A_MOMENT), ("b", "1", PLENTY)):
        await store.put(RecordId(namespace, tenant, key), b"x", parts={}, limits=limits)

    assert await becomes(2, lambda: store.count(namespace))
    assert await store.count(uuid.uuid4().hex) == 0


async def test_a_record_that_ends_soon_ends_no_account_of_those_that_stay(store: RecordStore) -> None:
    """As after a restart with a shorter lifetime."""
    namespace = uuid.uuid4().hex
    one, two, short = (RecordId(namespace, "tenant", key) for key in ("1", "2", "short"))
    await store.put(one, b"1", parts={}, limits=PLENTY)
    await store.put(two, b"2", parts={}, limits=PLENTY)

    await store.put(short, b"x", parts={}, limits=A_MOMENT)
    assert await becomes(None, lambda: store.get(short))

    assert await becomes(2, lambda: store.count(namespace))
    assert await store.values(namespace, "tenant") == {"1": b"1", "2": b"2"}
    await store.put(two, b"2", parts={}, limits=Limits(ttl_s=3600, max_records=1))
    assert await store.get(one) is None


async def added(store: RecordStore, record: RecordId, num_bytes: int, quota: Quota, *, ttl_s: float = 3600) -> bool:
    """Whether there was room for a record of so many bytes."""
    try:
        await store.add(record, b"value", parts={"data": bytes(num_bytes)}, ttl_s=ttl_s, quota=quota)
    except QuotaError:
        return False
    return True


async def test_an_added_record_is_read_and_listed_as_it_was_written(store: RecordStore) -> None:
    one, two = a_record("one"), a_record("two")
    quota = Quota(max_records=2, max_bytes=100)

    await store.add(one, b"1", parts={"a": b"\0\r\n", "b": b""}, ttl_s=3600, quota=quota)
    await store.add(RecordId("test", one.tenant, "two"), b"2", parts={}, ttl_s=3600, quota=quota)
    await store.add(two, b"other", parts={}, ttl_s=3600, quota=quota)

    assert await store.values("test", one.tenant) == {"one": b"1", "two": b"2"}
    assert await store.get(one) == b"1"
    assert await store.get_parts(one, ["a", "b", "c"]) == {"a": b"\0\r\n", "b": b""}
    assert await store.values("test", uuid.uuid4().hex) == {}


async def test_what_is_over_the_quota_is_not_added_and_ends_nothing(store: RecordStore) -> None:
    tenant = uuid.uuid4().hex
    names = [a_record(str(number), tenant=tenant) for number in range(6)]
    quota = Quota(max_records=3, max_bytes=10)

    assert [await added(store, names[0], 6, quota), await added(store, names[1], 5, quota)] == [True, False]
    assert [await added(store, names[2], 4, quota), await added(store, names[3], 0, quota)] == [True, True]
    with pytest.raises(QuotaError, match="3 records with 10 bytes") as refusal:
        await store.add(names[4], b"", parts={}, ttl_s=3600, quota=quota)

    assert (refusal.value.num_records, refusal.value.num_bytes) == (3, 10)
    assert sorted(await store.values("test", tenant)) == ["0", "2", "3"]
    assert await store.get(names[1]) is None
    assert await store.get_parts(names[1], ["data"]) == {}
    assert await added(store, a_record("0"), 10, quota), "another tenant's quota is another one"


async def test_deleted_and_ended_records_give_their_share_of_the_quota_back(store: RecordStore) -> None:
    tenant = uuid.uuid4().hex
    quota = Quota(max_records=2, max_bytes=10)
    assert await added(store, a_record("short", tenant=tenant), 4, quota, ttl_s=0.001)
    assert await becomes({}, lambda: store.values("test", tenant))
    assert await added(store, a_record("a", tenant=tenant), 10, quota)
    assert not await added(store, a_record("b", tenant=tenant), 1, quota)

    await store.delete(a_record("a", tenant=tenant))

    assert await added(store, a_record("b", tenant=tenant), 9, quota)
    assert await added(store, a_record("c", tenant=tenant), 1, quota, ttl_s=0.001)
    assert await becomes(["b"], lambda: keys_of(store, tenant)), "a record that ends soon does not end the account of the others"
    assert not await added(store, a_record("d", tenant=tenant), 2, quota)


async def keys_of(store: RecordStore, tenant: str) -> list[str]:
    return sorted(await store.values("test", tenant))


async def test_additions_at_once_by_two_servers_fill_the_quota_and_never_exceed_it(redis_url: str, tmp_path: Path) -> None:
    sizes = [number * 7 % 23 for number in range(24)]
    for where in (redis_url, str(tmp_path / "sessions.sqlite3")):
        async with open_store(where) as first, open_store(where) as second:
            for quota in (Quota(max_records=100, max_bytes=120), Quota(max_records=7, max_bytes=10_000)):
                tenant = uuid.uuid4().hex
                works = [
                    added((first, second)[number % 2], a_record(str(number), tenant=tenant), size, quota)
                    for number, size in enumerate(sizes)
                ]
                assert_filled(sizes, await asyncio.gather(*works), quota)
                assert len(await first.values("test", tenant)) == await count_of(second, tenant)


def assert_filled(sizes: Iterable[int], were_added: list[bool], quota: Quota) -> None:
    """What is there is within the quota, and nothing was refused that would still fit in."""
    kept = [size for size, was_added in zip(sizes, were_added, strict=True) if was_added]
    refused = [size for size, was_added in zip(sizes, were_added, strict=True) if not was_added]
    assert refused
    assert len(kept) <= quota.max_records
    assert sum(kept) <= quota.max_bytes
    assert len(kept) == quota.max_records or sum(kept) + min(refused) > quota.max_bytes


async def count_of(store: RecordStore, tenant: str) -> int:
    return len(await keys_of(store, tenant))


@given(st.lists(st.one_of(st.integers(0, 12), st.sampled_from("dw")), max_size=20))
@settings(max_examples=60, deadline=None)
def test_any_sequence_of_additions_leaves_what_an_honest_account_would(operations: list[Any]) -> None:
    asyncio.run(_compare_with_an_account(operations))


async def _compare_with_an_account(operations: list[Any]) -> None:
    """Additions of so many bytes for ten seconds, deletions of the oldest, and waits of four seconds."""
    now_s, account = 1000.0, dict[str, tuple[float, int]]()
    quota = Quota(max_records=4, max_bytes=30)
    store = await SqliteStore.open(":memory:", clock=lambda: now_s)
    for number, operation in enumerate(operations):
        if operation == "w":
            now_s += 4
            account = {key: entry for key, entry in account.items() if entry[0] > now_s}
        elif operation == "d":
            await store.delete(a_record(oldest := next(iter(account), "none"), tenant="t"))
            account.pop(oldest, None)
        else:
            fits = len(account) < 4 and sum(size for _, size in account.values()) + operation <= 30
            assert await added(store, a_record(str(number), tenant="t"), operation, quota, ttl_s=10) == fits
            account |= {str(number): (now_s + 10, operation)} if fits else {}
        assert set(await store.values("test", "t")) == set(account)
    await store.close()


async def test_one_has_the_lease_until_it_is_given_back(store: RecordStore) -> None:
    record = a_record()
    assert await store.acquire(record, "mine", lifetime_s=60)

    assert not await store.acquire(record, "yours", lifetime_s=60)
    await store.release(record, "yours")
    assert not await store.renew(record, "yours", lifetime_s=60)
    assert await store.renew(record, "mine", lifetime_s=60)
    await store.release(record, "mine")

    assert await store.acquire(record, "yours", lifetime_s=60)


async def test_a_lease_that_nobody_renews_ends(store: RecordStore) -> None:
    record = a_record()
    assert await store.acquire(record, "dead", lifetime_s=0.001)

    assert await becomes(True, lambda: store.acquire(record, "next", lifetime_s=60))
    assert not await store.renew(record, "dead", lifetime_s=60)


async def test_a_lease_that_ended_while_its_renewal_waited_is_renewed(tmp_path: Path) -> None:
    """Another tenant's large writes come first: nobody else has taken it meanwhile."""
    now_s = 1000.0
    store = await SqliteStore.open(tmp_path / "sessions.sqlite3", clock=lambda: now_s)
    record = a_record()
    assert await store.acquire(record, "mine", lifetime_s=10)

    now_s += 11

    assert await store.renew(record, "mine", lifetime_s=10)
    assert not await store.acquire(record, "yours", lifetime_s=10)
    await store.close()


async def test_more_operations_at_once_than_connections_wait(redis_url: str) -> None:
    store = await RedisStore.open(redis_url)
    record = a_record()
    await store.put(record, b"value", parts={}, limits=PLENTY)

    values = await asyncio.gather(*(store.get(record) for _ in range(3 * MAX_CONNECTIONS)))

    assert values == [b"value"] * 3 * MAX_CONNECTIONS
    await store.close()


async def test_nothing_is_written_under_a_lease_that_is_lost(store: RecordStore) -> None:
    record = a_record()
    await store.acquire(record, "mine", lifetime_s=60)
    await store.put(record, b"before", parts={}, limits=PLENTY, token="mine")
    await store.revoke(record)

    for attempt in (store.put(record, b"after", parts={"a": b"A"}, limits=PLENTY, token="mine"), store.delete(record, token="mine")):
        with pytest.raises(LeaseLostError):
            await attempt

    assert await store.get(record) == b"before"
    assert await store.get_parts(record, ["a"]) == {}


async def test_of_many_at_once_one_gets_the_lease(store: RecordStore) -> None:
    record = a_record()

    results = await asyncio.gather(*(store.acquire(record, str(number), lifetime_s=60) for number in range(20)))

    assert sum(results) == 1


async def test_writes_at_once_are_all_done(store: RecordStore) -> None:
    tenant = uuid.uuid4().hex

    await asyncio.gather(*(store.put(a_record(str(n), tenant=tenant), b"%d" % n, parts={}, limits=PLENTY) for n in range(20)))

    assert [await store.get(a_record(str(n), tenant=tenant)) for n in range(20)] == [b"%d" % n for n in range(20)]


SHORT = st.binary(max_size=3)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("put"), st.sampled_from("abcd"), st.binary(max_size=3), st.dictionaries(st.sampled_from("xy"), st.binary(max_size=3))
        ),
        st.tuples(st.just("delete"), st.sampled_from("abcd")),
        st.tuples(st.just("wait"), st.floats(0.5, 6)),
    ),
    max_size=12,
)


@given(OPERATIONS)
@settings(max_examples=60, deadline=None)
def test_any_sequence_of_writes_leaves_what_a_plain_dictionary_would_hold(operations: list[Any]) -> None:
    asyncio.run(_compare_with_a_dictionary(operations))


def size_of(entry: tuple[float, bytes, dict[str, bytes]]) -> int:
    return len(entry[1]) + sum(map(len, entry[2].values()))


async def _compare_with_a_dictionary(operations: list[Any]) -> None:
    """Three records at most, of twelve bytes together, each for ten seconds of a clock that the test moves."""
    now_s = 1000.0
    expected: dict[str, tuple[float, bytes, dict[str, bytes]]] = {}
    store = await SqliteStore.open(":memory:", clock=lambda: now_s)
    for operation, *rest in operations:
        if operation == "wait":
            now_s += rest[0]
        elif operation == "delete":
            await store.delete(a_record(rest[0], tenant="t"))
            expected.pop(rest[0], None)
        else:
            now_s += 0.001
            key, value, parts = rest
            await store.put(a_record(key, tenant="t"), value, parts=parts, limits=Limits(ttl_s=10, max_records=3, max_bytes=12))
            known = expected.pop(key)[2] if key in expected else {}
            expected[key] = (now_s + 10, value, parts | known)
            while len(expected) > 3 or (len(expected) > 1 and sum(map(size_of, expected.values())) > 12):
                del expected[min(expected, key=lambda key: expected[key][0])]
        expected = {key: entry for key, entry in expected.items() if entry[0] > now_s}
        for key in "abcd":
            end = expected.get(key)
            assert await store.get(a_record(key, tenant="t")) == (end[1] if end else None)
            if end:
                assert await store.get_parts(a_record(key, tenant="t"), "xy") == end[2]
        assert await store.count("test") == len(expected)
    await store.close()


async def _outcome(work: Awaitable[Any]) -> Any:
    try:
        return await work
    except LeaseLostError:
        return "lost"
    except QuotaError as refusal:
        return refusal.num_records, refusal.num_bytes


def _random_operation(rng: random.Random, number: int, namespace: str) -> Callable[[RecordStore], Awaitable[Any]]:
    """Any one with arguments that often meet what earlier ones left. Added records have a namespace of their own, as the protocol wants."""
    tenant, token, ttl_s = rng.choice("ab"), rng.choice("uv"), rng.choice((3600, 7200, 3600 * 24))
    record, new = RecordId(namespace, tenant, rng.choice("1234")), RecordId(namespace + "added", tenant, str(number))
    value, parts = bytes(rng.randrange(10)), {name: bytes(rng.randrange(20)) for name in rng.sample("xyz", rng.randrange(3))}
    limits = Limits(3600, rng.choice((1, 2, 3, 100)), rng.choice((0, 20, 60, 1 << 30)))
    quota = Quota(rng.choice((1, 3, 10)), rng.choice((10, 50, 1000)))
    token_or_none = rng.choice((token, None, None))

    async def put_for_a_moment(store: RecordStore) -> None:
        await store.put(record, value, parts=parts, limits=A_MOMENT)
        await becomes(None, lambda: store.num_bytes(record))

    operations: list[Callable[[RecordStore], Awaitable[Any]]] = [
        lambda store: store.put(record, value, parts=parts, limits=limits, token=token_or_none),
        put_for_a_moment,
        lambda store: store.add(new, value, parts=parts, ttl_s=ttl_s, quota=quota),
        lambda store: store.delete(record, token=token_or_none),
        lambda store: store.get(record),
        lambda store: store.get_parts(record, "xyz"),
        lambda store: store.num_bytes(record),
        lambda store: store.values(of_either, tenant),
        lambda store: store.count(of_either),
        lambda store: store.acquire(record, token, lifetime_s=3600),
        lambda store: store.renew(record, token, lifetime_s=3600),
        lambda store: store.release(record, token),
        lambda store: store.revoke(record),
    ]
    of_either = rng.choice((namespace, namespace + "added"))
    return rng.choice(operations)


@pytest.mark.parametrize("seed", range(4))
async def test_all_kinds_of_store_answer_the_same_to_the_same_operations(redis_url: str, tmp_path: Path, seed: int) -> None:
    rng, namespace = random.Random(seed), uuid.uuid4().hex
    async with open_store("memory") as memory, open_store(str(tmp_path / "sessions.sqlite3")) as file, open_store(redis_url) as redis:
        for number in range(60):
            operation = _random_operation(rng, number, namespace)

            outcomes = [await _outcome(operation(store)) for store in (memory, file, redis)]

            assert outcomes[1:] == outcomes[:1] * 2, f"operation {number}"


async def test_the_file_and_its_journals_are_its_owners_alone_and_shrink_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sessions.sqlite3"
    path.parent.mkdir(mode=0o755)
    path.touch(mode=0o644)

    async with open_store(str(path)) as store:
        record = a_record()
        await store.put(record, b"x", parts={"a": bytes(1 << 20)}, limits=PLENTY)
        assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}
        await store.delete(record)

    assert path.stat().st_size < 1 << 18


async def test_a_file_outlives_its_store_and_is_shared_by_two(tmp_path: Path) -> None:
    path, record = str(tmp_path / "sessions.sqlite3"), a_record()
    async with open_store(path) as first, open_store(path) as second:
        await first.put(record, b"x", parts={"a": b"A"}, limits=PLENTY)
        assert await second.get(record) == b"x"
        assert await first.acquire(record, "mine", lifetime_s=60)
        assert not await second.acquire(record, "yours", lifetime_s=60)

    async with open_store(path) as third:
        assert await third.get_parts(record, ["a"]) == {"a": b"A"}


def bytes_of_all_files(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.iterdir())


async def none_of_it_is_left(folder: Path) -> bool:
    return SECRET not in bytes_of_all_files(folder)


@pytest.mark.parametrize("end", ["deleted", "expired", "surplus"])
async def test_what_has_ended_is_soon_in_none_of_the_files(tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_store, "CHECKPOINT_DELAY_S", 0.0)
    record, now_s = a_record(), 0.0
    other = a_record("2", tenant=record.tenant)
    store = await SqliteStore.open(tmp_path / "sessions.sqlite3", clock=lambda: now_s)
    await store.put(record, SECRET, parts={"a": SECRET * 3000}, limits=PLENTY)
    await store.add(a_record(), b"kept", parts={}, ttl_s=1e9, quota=Quota(9, 9))
    assert SECRET in bytes_of_all_files(tmp_path)

    if end == "deleted":
        await store.delete(record)
    else:
        now_s = 4000.0 if end == "expired" else 1.0
        await store.put(other, b"x", parts={}, limits=Limits(ttl_s=3600, max_records=1))

    assert await becomes(True, lambda: none_of_it_is_left(tmp_path))
    await store.close()


async def test_another_process_that_reads_delays_the_overwriting_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_store, "CHECKPOINT_DELAY_S", 0.0)
    monkeypatch.setattr(sqlite_store, "_CHECKPOINT_TIMEOUT_S", 0.001)
    record = a_record()
    async with open_store(str(tmp_path / "sessions.sqlite3")) as store:
        await store.put(record, SECRET, parts={}, limits=PLENTY)
        reader = sqlite3.connect(tmp_path / "sessions.sqlite3", isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT COUNT(*) FROM records").fetchone()

        await store.delete(record)
        await store.put(record, b"other", parts={}, limits=PLENTY)
        assert await store.get(record) == b"other"
        assert SECRET in bytes_of_all_files(tmp_path)
        reader.close()

        assert await becomes(True, lambda: none_of_it_is_left(tmp_path))


@pytest.fixture
def opened_elsewhere(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """Another server's connection to a new file, at work on it, not yet in WAL mode: SQLite lets nobody else change the mode then."""
    connection = sqlite3.connect(tmp_path / "sessions.sqlite3", isolation_level=None, check_same_thread=False)
    connection.execute("CREATE TABLE others (id)")
    connection.execute("BEGIN IMMEDIATE")
    yield connection
    connection.close()


async def test_a_file_that_another_server_is_opening_is_waited_for(
    tmp_path: Path, opened_elsewhere: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, waits_s = a_record(), []

    def wait(duration_s: float) -> None:
        waits_s.append(duration_s)
        if len(waits_s) == 3:
            opened_elsewhere.execute("COMMIT")

    monkeypatch.setattr("vlm_server.sessions.sqlite_store.time.sleep", wait)

    async with open_store(str(tmp_path / "sessions.sqlite3")) as store:
        await store.put(record, b"x", parts={}, limits=PLENTY)
        assert await store.get(record) == b"x"
    assert len(waits_s) == 3


async def test_a_file_that_stays_locked_is_not_waited_for_without_end(
    tmp_path: Path, opened_elsewhere: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_server.sessions.sqlite_store.BUSY_TIMEOUT_S", 0.0)

    with pytest.raises(StoreError, match="cannot be opened: database is locked"):
        async with open_store(str(tmp_path / "sessions.sqlite3")):
            pass


async def test_two_servers_share_a_redis(redis_url: str) -> None:
    record = a_record()
    async with open_store(redis_url) as first, open_store(redis_url) as second:
        await first.put(record, b"x", parts={"a": b"A"}, limits=PLENTY)
        assert await first.acquire(record, "mine", lifetime_s=60)

        assert await second.get_parts(record, ["a"]) == {"a": b"A"}
        assert not await second.acquire(record, "yours", lifetime_s=60)


async def test_a_write_that_others_disturb_is_tried_again_and_keeps_its_lease(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading of the surplus is followed by somebody's renewal, which the transaction must not pass over."""
    record = a_record()
    async with open_store(redis_url) as store:
        assert isinstance(store, RedisStore)
        await store.acquire(record, "mine", lifetime_s=60)
        times = itertools.count()

        async def disturbed(*args: Any) -> list[bytes]:
            if next(times) < 2:
                await store.renew(record, "mine", lifetime_s=60)
            return []

        monkeypatch.setattr("vlm_server.sessions.redis_store._surplus", disturbed)
        await store.put(record, b"x", parts={}, limits=PLENTY, token="mine")

        assert await store.get(record) == b"x"
        assert next(times) == 3


async def test_a_folder_or_another_programs_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database" * 1000)
    newer = sqlite3.connect(tmp_path / "newer")
    newer.execute("PRAGMA user_version = 99")
    newer.close()

    for name, reason in ((".", "opened"), ("text", "not a database"), ("newer", "version 99")):
        with pytest.raises(StoreError, match=reason):
            async with open_store(str(tmp_path / name)):
                pass


async def test_a_redis_that_does_not_answer_is_refused() -> None:
    with pytest.raises(StoreError, match="failed"):
        async with open_store("redis://127.0.0.1:1/0"):
            pass


async def test_redis_without_its_package_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vlm_server.sessions.redis_store", None)

    with pytest.raises(StoreError, match=r"pip install 'vlm-server\[redis\]'"):
        async with open_store("redis://127.0.0.1/0"):
            pass


async def test_the_default_is_a_file_in_the_state_folder_or_else_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    async with open_store("auto"):
        assert default_path() == tmp_path / "state" / "vlm-server" / "sessions.sqlite3"
        assert default_path().is_file()
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")

    async with open_store("auto") as store:
        await store.put(a_record(), b"x", parts={}, limits=PLENTY)

    assert "kept in memory" in caplog.text
