"""Interactive sessions: the messages, pictures and tokens of a conversation, between its turns.

A session is one record: its messages and transcript are the value, its pictures' files the parts, named by their digests. In the messages
stands a URL of our own in place of each picture's, which may lead elsewhere by the next turn. Knows nothing of HTTP or of prompts.
"""

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from vision.media_budgets import hold_kept_bytes
from vlm_server.sessions.lease import LeaseTimes, RecordBusyError, leased
from vlm_server.sessions.store import Limits, RecordId, RecordStore, UnreadableRecordError
from vlm_server.transcript import Transcript

NAMESPACE = "interactive"
PICTURE_SCHEME = "session-picture:"

Message = dict[str, Any]


class SessionBusyError(Exception):
    """Another turn of the session is under way."""

    def __init__(self) -> None:
        super().__init__("session_id: another turn of this session is under way; wait for its end, or cancel it")


class History(msgspec.Struct, frozen=True):
    """A conversation so far."""

    messages: list[Message] = []
    transcript: Transcript = Transcript()
    picture_urls: list[str] = []  # each once


@dataclass(slots=True)
class OpenSession:
    """A session while a turn works on it."""

    history: History
    pictures: dict[str, bytes]  # the history's, by their URL in its messages
    _store: RecordStore = field(repr=False)
    _record_id: RecordId = field(repr=False)
    _limits: Limits = field(repr=False)
    _token: str = field(repr=False)

    @property
    def num_picture_bytes(self) -> int:
        return sum(map(len, self.pictures.values()))

    async def save(self, history: History, pictures: dict[str, bytes]) -> None:
        """The conversation from now on, with all of its pictures. Raises LeaseLostError or StoreError, and then nothing has changed."""
        parts = {_part_name(url): data for url, data in pictures.items()}
        value = msgspec.msgpack.encode(history)
        await self._store.put(self._record_id, value, parts=parts, limits=self._limits, token=self._token)

    async def end(self) -> None:
        await self._store.delete(self._record_id, token=self._token)


class Sessions:
    """All sessions of one model. `max_bytes`: of one session's pictures."""

    def __init__(self, store: RecordStore, *, model: str, limits: Limits, max_bytes: int, times: LeaseTimes | None = None) -> None:
        self.max_bytes = max_bytes
        self._store = store
        self._model = model
        self._limits = limits
        self._times = times or LeaseTimes()

    def id_of(self, tenant: str, number: int) -> RecordId:
        """Of a client's session number: another tenant's, or another model's, is another session."""
        return RecordId(NAMESPACE, tenant, f"{self._model}/{number}")

    @asynccontextmanager
    async def open(self, session_id: RecordId, *, on_lost: Callable[[], None]) -> AsyncIterator[OpenSession]:
        """The session, for one turn alone; empty where there is none yet. `on_lost`: the turn was cancelled from elsewhere.

        Its bytes count for the request of the moment until that ends. Raises SessionBusyError, StoreError, UnreadableRecordError among
        them, or BudgetFullError.
        """
        try:
            async with leased(self._store, session_id, times=self._times, on_lost=on_lost) as token:
                await hold_kept_bytes(await self._store.num_bytes(session_id) or 0)
                history = await self._load(session_id)
                pictures = await self._load_pictures(session_id, history)
                yield OpenSession(history, pictures, self._store, session_id, self._limits, token)
        except RecordBusyError:
            raise SessionBusyError from None

    async def end(self, session_id: RecordId) -> None:
        """Ends the session, whatever its record holds. Raises SessionBusyError or StoreError."""
        try:
            async with leased(self._store, session_id, times=self._times, on_lost=lambda: None):
                await self._store.delete(session_id)
        except RecordBusyError:
            raise SessionBusyError from None

    async def revoke(self, session_id: RecordId) -> None:
        """Takes the session from the turn that works on it, on whichever server; that turn can no longer save."""
        await self._store.revoke(session_id)

    async def count(self) -> int:
        """Sessions of all tenants and models in the store."""
        return await self._store.count(NAMESPACE)

    async def _load(self, session_id: RecordId) -> History:
        value = await self._store.get(session_id)
        if value is None:
            return History()
        try:
            return msgspec.msgpack.decode(value, type=History)
        except msgspec.DecodeError as error:
            raise UnreadableRecordError("session_id: another version of this server kept the session; end it to begin anew") from error

    async def _load_pictures(self, session_id: RecordId, history: History) -> dict[str, bytes]:
        found = await self._store.get_parts(session_id, [_part_name(url) for url in history.picture_urls])
        if len(found) < len(history.picture_urls):
            raise UnreadableRecordError("session_id: a picture of the session is not in the store any more; end the session to begin anew")
        return {url: found[_part_name(url)] for url in history.picture_urls}


def picture_url(data: bytes) -> str:
    """What a session's messages call a picture."""
    return PICTURE_SCHEME + hashlib.sha256(data).hexdigest()


def _part_name(url: str) -> str:
    return url.removeprefix(PICTURE_SCHEME)
