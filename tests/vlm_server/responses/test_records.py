"""Kept responses: whose they are, how long, how many, how large."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from vlm_server.responses.records import KeptResponse, ResponseRecords, TooLargeError, new_response_id
from vlm_server.sessions.sqlite_store import IN_MEMORY, SqliteStore
from vlm_server.sessions.store import Limits, RecordId, UnreadableRecordError


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(clock: Clock) -> AsyncIterator[SqliteStore]:
    store = await SqliteStore.open(IN_MEMORY, clock=clock)
    yield store
    await store.close()


@pytest.fixture
def records(store: SqliteStore) -> ResponseRecords:
    return ResponseRecords(store, limits=Limits(ttl_s=60, max_records=2), max_bytes=100)


def response() -> KeptResponse:
    schema = {"maximum": 10**30}
    return KeptResponse({"id": new_response_id(), "output": [{"id": "o"}], "tools": [{"parameters": schema}]}, [{"id": "i", "text": "你"}])


async def kept(records: ResponseRecords, tenant: str = "t") -> str:
    one = response()
    await records.keep(tenant, one)
    return str(one.response["id"])


async def test_a_response_is_found_as_it_was_kept(records: ResponseRecords) -> None:
    one = response()

    await records.keep("t", one)

    found = await records.find("t", one.response["id"])
    assert found == one
    assert [item["id"] for item in found.conversation] == ["i", "o"]


async def test_another_tenants_response_is_neither_found_nor_deleted(records: ResponseRecords) -> None:
    response_id = await kept(records)

    assert await records.find("other", response_id) is None
    assert not await records.delete("other", response_id)
    assert await records.find("t", response_id) is not None


async def test_a_deleted_response_is_gone(records: ResponseRecords) -> None:
    response_id = await kept(records)

    assert await records.delete("t", response_id)
    assert await records.find("t", response_id) is None
    assert not await records.delete("t", response_id)


async def test_a_response_ends_in_time_although_it_is_read(records: ResponseRecords, clock: Clock) -> None:
    response_id = await kept(records)
    clock.now_s += 59
    assert await records.find("t", response_id) is not None

    clock.now_s += 2

    assert await records.find("t", response_id) is None


async def test_a_tenants_oldest_responses_make_room(records: ResponseRecords, clock: Clock) -> None:
    ids = []
    for _ in range(3):
        ids.append(await kept(records))
        clock.now_s += 1
    others = await kept(records, "other")

    assert [await records.find("t", response_id) is not None for response_id in ids] == [False, True, True]
    assert await records.find("other", others) is not None


async def test_items_beyond_the_limit_are_refused(records: ResponseRecords) -> None:
    await records.check([{"text": "x" * 80}])

    with pytest.raises(TooLargeError, match="100"):
        await records.check([{"text": "x" * 100}])


@pytest.mark.parametrize("response_id", ["", "resp_", "resp_" + "g" * 32, "resp_" + "0" * 33, "\ud800", "msg_" + "0" * 32])
async def test_what_is_no_id_is_not_looked_up(response_id: str) -> None:
    no_store: Any = None

    assert await ResponseRecords(no_store, limits=Limits(1, 1), max_bytes=1).find("t", response_id) is None


async def test_a_record_of_another_version_says_so(records: ResponseRecords, store: SqliteStore) -> None:
    response_id = new_response_id()
    await store.put(RecordId("responses", "t", response_id), b'{"response": 5}', parts={}, limits=Limits(60, 10))

    with pytest.raises(UnreadableRecordError, match=r"^response_id: .* another version"):
        await records.find("t", response_id)
