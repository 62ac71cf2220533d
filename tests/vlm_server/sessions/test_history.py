"""Interactive sessions over each kind of store: one turn at a time, all or nothing."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from vlm_server.sessions.history import NAMESPACE, History, SessionBusyError, Sessions, picture_url
from vlm_server.sessions.lease import LeaseTimes
from vlm_server.sessions.store import LeaseLostError, Limits, RecordId, RecordStore, UnreadableRecordError
from vlm_server.transcript import Segment, Transcript

LIMITS = Limits(ttl_s=3600, max_records=100)
PICTURE = b"\x89PNG..."
URL = picture_url(PICTURE)
HISTORY = History(
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL, "detail": "low"}}, {"type": "text", "text": "你"}]},
        {"role": "assistant", "content": "好"},
    ],
    Transcript((Segment("<image>你", (1, 2, 3), (4,)), Segment("好", (5,))), "fingerprint"),
    [URL],
)


def sessions_in(store: Any, **options: Any) -> Sessions:
    return Sessions(store, **{"model": "m", "limits": LIMITS, "max_bytes": 1000, **options})


@pytest.fixture
def sessions(store: RecordStore) -> Sessions:
    return sessions_in(store)


@pytest.fixture
def tenant() -> str:
    return uuid.uuid4().hex


def never() -> None:
    raise AssertionError("the lease was lost")


async def until_true(is_met: Callable[[], Awaitable[bool]]) -> None:
    deadline_s = time.monotonic() + 5
    while not await is_met():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.001)


async def test_a_turn_finds_what_the_last_one_saved(sessions: Sessions, tenant: str) -> None:
    async with sessions.open(sessions.id_of(tenant, 1), on_lost=never) as session:
        assert session.history == History()
        await session.save(HISTORY, {URL: PICTURE})

    async with sessions.open(sessions.id_of(tenant, 1), on_lost=never) as session:
        assert session.history == HISTORY
        assert session.pictures == {URL: PICTURE}
        assert session.num_picture_bytes == len(PICTURE)
        await session.end()

    async with sessions.open(sessions.id_of(tenant, 1), on_lost=never) as session:
        assert session.history == History()


async def test_sessions_of_other_tenants_models_and_numbers_are_others(store: RecordStore, sessions: Sessions, tenant: str) -> None:
    async with sessions.open(sessions.id_of(tenant, 1), on_lost=never) as session:
        await session.save(HISTORY, {URL: PICTURE})
    other_model = sessions_in(store, model="other")

    for where, session_id in (
        (sessions, sessions.id_of(tenant, 2)),
        (sessions, sessions.id_of(uuid.uuid4().hex, 1)),
        (other_model, other_model.id_of(tenant, 1)),
    ):
        async with where.open(session_id, on_lost=never) as session:
            assert session.history == History()


async def test_a_second_turn_at_once_is_refused_and_a_later_one_is_not(sessions: Sessions, tenant: str) -> None:
    session_id = sessions.id_of(tenant, 1)
    async with sessions.open(session_id, on_lost=never):
        with pytest.raises(SessionBusyError, match="another turn of this session"):
            async with sessions.open(session_id, on_lost=never):
                pass
        with pytest.raises(SessionBusyError):
            await sessions.end(session_id)
        async with sessions.open(sessions.id_of(tenant, 2), on_lost=never):
            pass

    async with sessions.open(session_id, on_lost=never):
        pass


async def test_a_turn_that_fails_or_is_cancelled_leaves_the_session_free_and_as_it_was(sessions: Sessions, tenant: str) -> None:
    session_id, is_open = sessions.id_of(tenant, 1), asyncio.Event()
    async with sessions.open(session_id, on_lost=never) as session:
        await session.save(HISTORY, {URL: PICTURE})

    async def turn() -> None:
        async with sessions.open(session_id, on_lost=never):
            is_open.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(turn())
    await is_open.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    with pytest.raises(ZeroDivisionError):
        async with sessions.open(session_id, on_lost=never):
            _ = 1 / 0

    async with sessions.open(session_id, on_lost=never) as session:
        assert session.history == HISTORY


class SlowRelease:
    """A store whose releases wait to be let go."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self.is_asked = asyncio.Event()
        self.may_go = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def release(self, *args: Any) -> None:
        self.is_asked.set()
        await self.may_go.wait()
        await self._store.release(*args)


@pytest.mark.parametrize("num_more", [1, 3])
async def test_a_turn_that_is_cancelled_again_while_its_lease_is_given_back_leaves_the_session_free(
    store: RecordStore, tenant: str, num_more: int
) -> None:
    slow = SlowRelease(store)
    sessions = sessions_in(slow)
    session_id, is_open = sessions.id_of(tenant, 1), asyncio.Event()

    async def turn() -> None:
        async with sessions.open(session_id, on_lost=never):
            is_open.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(turn())
    await is_open.wait()
    task.cancel()
    await slow.is_asked.wait()
    for _ in range(num_more):
        task.cancel()
        await asyncio.sleep(0)
    slow.may_go.set()
    await asyncio.wait((task,))

    assert task.cancelled()
    assert await _can_open(sessions_in(store), session_id)


async def test_a_turn_whose_session_is_revoked_elsewhere_hears_of_it_and_cannot_save(store: RecordStore, tenant: str) -> None:
    here, elsewhere = sessions_in(store, times=LeaseTimes(60, 0.001)), sessions_in(store)
    is_lost = asyncio.Event()

    async with here.open(here.id_of(tenant, 1), on_lost=is_lost.set) as session:
        await elsewhere.revoke(elsewhere.id_of(tenant, 1))
        await asyncio.wait_for(is_lost.wait(), 5)
        async with elsewhere.open(elsewhere.id_of(tenant, 1), on_lost=never) as other:
            with pytest.raises(LeaseLostError):
                await session.save(History(), {})
            await other.save(HISTORY, {URL: PICTURE})

    async with here.open(here.id_of(tenant, 1), on_lost=never) as session:
        assert session.history == HISTORY


async def test_a_long_turn_renews_its_lease_and_a_dead_server_does_not(store: RecordStore, tenant: str) -> None:
    sessions = sessions_in(store, times=LeaseTimes(lifetime_s=60, renewal_s=0.001))
    session_id = sessions.id_of(tenant, 1)
    renewals = 0
    renew = store.renew

    async def counted(*args: Any, **options: Any) -> bool:
        nonlocal renewals
        renewals += 1
        return await renew(*args, **options)

    store.renew = counted  # type: ignore[method-assign]
    async with sessions.open(session_id, on_lost=never):
        await until_true(lambda: _result(renewals > 3))
        assert not await store.acquire(session_id, "other", lifetime_s=1)
    await store.acquire(session_id, "of a server that died", lifetime_s=0.001)

    await until_true(lambda: _can_open(sessions, session_id))


async def _result(value: bool) -> bool:
    return value


async def _can_open(sessions: Sessions, session_id: RecordId) -> bool:
    try:
        async with sessions.open(session_id, on_lost=never):
            return True
    except SessionBusyError:
        return False


async def test_a_session_that_lost_its_pictures_or_its_form_says_so_until_it_is_ended(
    store: RecordStore, sessions: Sessions, tenant: str
) -> None:
    one, two = sessions.id_of(tenant, 1), sessions.id_of(tenant, 2)
    async with sessions.open(one, on_lost=never) as session:
        await session.save(HISTORY, {})
    await store.put(two, b"\xc1 no msgpack", parts={}, limits=LIMITS)

    for session_id, reason in ((one, "picture"), (two, "another version")):
        with pytest.raises(UnreadableRecordError, match=rf"^session_id: .*{reason}"):
            async with sessions.open(session_id, on_lost=never):
                pass
        await sessions.end(session_id)
        async with sessions.open(session_id, on_lost=never) as session:
            assert session.history == History()


async def test_sessions_are_counted(sessions: Sessions, store: RecordStore, tenant: str) -> None:
    before = await store.count(NAMESPACE)

    async with sessions.open(sessions.id_of(tenant, 1), on_lost=never) as session:
        await session.save(HISTORY, {URL: PICTURE})

    assert await sessions.count() == before + 1
