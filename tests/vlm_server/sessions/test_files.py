"""Uploaded files over each kind of store: whole, their owner's alone, within the quota, or not there at all."""

import asyncio
import uuid
from typing import Any

import pytest

from vision.budget import BudgetFullError
from vision.config import VisionConfig
from vision.media_budgets import Holding, MediaBudgets, held_by
from vlm_server.errors import ApiError
from vlm_server.files import NAMESPACE, Files, images_in
from vlm_server.sessions.store import Quota, RecordId, RecordStore

PLENTY = Quota(max_records=100, max_bytes=1 << 20)
DATA = bytes(range(256)) * 100


def files_in(store: Any, quota: Quota = PLENTY) -> Files:
    return Files(store, quota, max_request_bytes=1 << 20)


async def add(files: Files, tenant: str, data: bytes = DATA, *, ttl_s: float = 3600) -> str:
    return (await files.add(tenant, data, filename="a.png", purpose="vision", ttl_s=ttl_s)).id


@pytest.fixture
def tenant() -> str:
    return uuid.uuid4().hex


async def test_a_file_is_its_owners_and_comes_back_bit_by_bit(store: RecordStore, tenant: str) -> None:
    files, other = files_in(store), uuid.uuid4().hex
    ids = [await add(files, tenant, DATA[:number]) for number in range(3)]

    assert [file.id for file in await files.all(tenant)] == ids
    assert [await files.content(tenant, file_id) for file_id in ids] == [b"", b"\0", b"\0\1"]
    assert await files.all(other) == []
    for attempt in (files.get(other, ids[0]), files.content(other, ids[0]), files.delete(other, ids[0])):
        with pytest.raises(ApiError, match="no such file"):
            await attempt
    assert (await files.get(tenant, ids[1])).num_bytes == 1


async def test_a_file_of_another_version_is_left_out_and_can_be_deleted(store: RecordStore, tenant: str) -> None:
    files = files_in(store)
    kept, strange = await add(files, tenant), f"file-{uuid.uuid4().hex}"
    await store.add(RecordId(NAMESPACE, tenant, strange), b"\xc1", parts={"content": DATA}, quota=PLENTY, ttl_s=3600)

    assert [file.id for file in await files.all(tenant)] == [kept]
    with pytest.raises(ApiError, match="no such file"):
        await files.get(tenant, strange)
    await files.delete(tenant, strange)
    assert await store.get(RecordId(NAMESPACE, tenant, strange)) is None


class UnreadableStore:
    """A store that says what it has, and from which no part may be read."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        assert name != "get_parts"
        return getattr(self._store, name)


async def test_the_bytes_of_a_file_count_before_they_are_read(store: RecordStore, tenant: str) -> None:
    budgets = MediaBudgets(VisionConfig(max_media_bytes_in_flight=60_000, budget_wait_s=0.0))
    file_id = await add(files_in(store), tenant)

    with held_by(Holding(budgets, "a")):
        assert await files_in(store).content(tenant, file_id) == DATA
        assert budgets.bytes.used == len(DATA)
        with await budgets.bytes.reserve(20_000), held_by(Holding(budgets, "b")), pytest.raises(BudgetFullError):
            await files_in(UnreadableStore(store)).content(tenant, file_id)

    assert budgets.bytes.used == 0


async def test_what_messages_name_is_read_once_and_stands_there_as_a_url(store: RecordStore, tenant: str) -> None:
    files = files_in(store)
    file_id = await add(files, tenant)
    image = {"type": "image_url", "image_url": {"file_id": file_id, "detail": "low"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}, image]}, {"role": "tool", "content": [dict(image)]}]
    messages[1]["content"][0]["image_url"] = dict(image["image_url"])  # type: ignore[index, call-overload]

    pictures = await files.take(images_in(messages), tenant=tenant)

    [url] = pictures
    assert pictures[url] == DATA
    assert image["image_url"] == {"url": url, "detail": "low"}
    assert list(images_in(messages)) == []


class SlowStore:
    """Whose additions are done before anybody hears of it."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self.is_done = asyncio.Event()
        self.is_heard = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def add(self, *args: Any, **options: Any) -> None:
        try:
            await self._store.add(*args, **options)
        finally:
            self.is_done.set()
        await self.is_heard.wait()


@pytest.mark.parametrize("num_times", [1, 2, 4])
async def test_an_upload_whose_client_leaves_while_it_is_written_is_taken_back(store: RecordStore, tenant: str, num_times: int) -> None:
    slow = SlowStore(store)
    upload = asyncio.create_task(add(files_in(slow), tenant))
    await slow.is_done.wait()
    assert len(await files_in(store).all(tenant)) == 1

    for _ in range(num_times):
        upload.cancel()
        await asyncio.sleep(0)
    slow.is_heard.set()
    with pytest.raises(asyncio.CancelledError):
        await upload

    assert await files_in(store).all(tenant) == []
    assert await add(files_in(store, Quota(max_records=1, max_bytes=len(DATA))), tenant), "the quota is free again"


async def test_a_refused_upload_whose_client_leaves_is_just_gone(store: RecordStore, tenant: str) -> None:
    slow = SlowStore(store)
    upload = asyncio.create_task(add(files_in(slow, Quota(max_records=0, max_bytes=0)), tenant))
    await slow.is_done.wait()

    upload.cancel()

    with pytest.raises((asyncio.CancelledError, ApiError)):
        await upload
    assert await files_in(store).all(tenant) == []
