"""Responses that are kept, for retrieval and for the conversations that go on from them.

One record per response, written once: the response, and the items of the whole conversation before it, so that each can be continued
after those before it are gone. Pictures stay as they were sent, an address as an address, which may lead elsewhere by then. Knows
nothing of HTTP or of prompts.
"""

import asyncio
import re
import uuid
from typing import Any

import msgspec

from vision.media_budgets import hold_kept_bytes
from vlm_server.sessions.store import Limits, RecordId, RecordStore, UnreadableRecordError

NAMESPACE = "responses"

_ID = re.compile(r"resp_[0-9a-f]{32}")


class TooLargeError(Exception):
    """The conversation has more bytes than one response may keep."""

    def __init__(self, num_bytes: int, max_bytes: int) -> None:
        super().__init__(f"the conversation has {num_bytes} bytes as JSON, {max_bytes} are kept at most")


class KeptResponse(msgspec.Struct, frozen=True):
    """A response, and the items that it answered, oldest first."""

    response: dict[str, Any]
    items: list[dict[str, Any]]

    @property
    def conversation(self) -> list[dict[str, Any]]:
        return [*self.items, *self.response["output"]]


class ResponseRecords:
    """All kept responses; each belongs to its tenant. `max_bytes`: of the items of one response.

    Every method may raise StoreError. What is read counts for the request of the moment until it ends.
    """

    def __init__(self, store: RecordStore, *, limits: Limits, max_bytes: int) -> None:
        self._store = store
        self._limits = limits
        self._max_bytes = max_bytes

    async def check(self, items: list[dict[str, Any]]) -> None:
        """Raises TooLargeError where the items could not be kept."""
        num_bytes = len(await asyncio.to_thread(msgspec.json.encode, items))
        if num_bytes > self._max_bytes:
            raise TooLargeError(num_bytes, self._max_bytes)

    async def keep(self, tenant: str, kept: KeptResponse) -> None:
        value = await asyncio.to_thread(msgspec.json.encode, kept)  # not msgpack: a schema's numbers may have any size
        await self._store.put(_record(tenant, kept.response["id"]), value, parts={}, limits=self._limits)

    async def find(self, tenant: str, response_id: str, *, param: str = "response_id") -> KeptResponse | None:
        """None for one that was never kept, has ended, or is another tenant's.

        Raises BudgetFullError, or UnreadableRecordError, which names `param`.
        """
        num_bytes = await self._num_bytes(tenant, response_id)
        if num_bytes is None:
            return None
        await hold_kept_bytes(num_bytes)
        value = await self._store.get(_record(tenant, response_id))
        if value is None:  # it has just ended
            return None
        try:
            return await asyncio.to_thread(msgspec.json.decode, value, type=KeptResponse)
        except msgspec.DecodeError as error:
            raise UnreadableRecordError(f"{param}: the response was kept by another version of this server") from error

    async def delete(self, tenant: str, response_id: str) -> bool:
        """Whether there was one."""
        if not await self.has(tenant, response_id):
            return False
        await self._store.delete(_record(tenant, response_id))
        return True

    async def has(self, tenant: str, response_id: str) -> bool:
        """Whether `find` would find it, which is not read for it."""
        return await self._num_bytes(tenant, response_id) is not None

    async def _num_bytes(self, tenant: str, response_id: str) -> int | None:
        return await self._store.num_bytes(_record(tenant, response_id)) if _ID.fullmatch(response_id) else None


def new_response_id() -> str:
    return f"resp_{uuid.uuid4().hex}"


def _record(tenant: str, response_id: str) -> RecordId:
    return RecordId(NAMESPACE, tenant, response_id)
