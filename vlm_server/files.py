"""Uploaded pictures: kept for a while for the API key that sent them, and found again by the ids that messages name them with.

A file is one record of the session store: what is known of it is the value, its bytes the one part. An upload over the key's quota is
refused; no older file makes room for it. Knows nothing of forms, of how pictures are read, or of prompts.
"""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from vision.image import MediaError
from vision.media_budgets import hold_bytes
from vlm_server.errors import ApiError, bad_request
from vlm_server.finishing import finished
from vlm_server.sessions.store import Quota, QuotaError, RecordId, RecordStore

logger = logging.getLogger(__name__)

NAMESPACE = "files"
URL_SCHEME = "uploaded-file:"  # what stands in a message in a file id's place; never fetched

_CONTENT = "content"
_FILE_ID = re.compile(r"file-[0-9a-f]{32}")

Image = dict[str, Any]  # an `image_url` object of a message


class StoredFile(msgspec.Struct, frozen=True):
    """What is known of a file beside its bytes."""

    id: str
    filename: str
    purpose: str
    num_bytes: int
    created_s: float  # Unix time, as are all here
    expires_s: float


@dataclass(frozen=True, slots=True)
class Files:
    """All files of a store. `clock`: Unix time. max_request_bytes: of the files that one request names."""

    store: RecordStore
    quota: Quota
    max_request_bytes: int
    clock: Callable[[], float] = time.time

    async def add(self, tenant: str, data: bytes, *, filename: str, purpose: str, ttl_s: float) -> StoredFile:
        """The new file. Where the caller is cancelled, nobody learns of its id, and nothing is kept. Raises ApiError 413 or StoreError."""
        created_s = self.clock()
        file = StoredFile(f"file-{secrets.token_hex(16)}", filename, purpose, len(data), created_s, created_s + ttl_s)
        writing = asyncio.create_task(self._write(tenant, file, data, ttl_s))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await finished(self._take_back(tenant, file.id, writing))
            raise
        return file

    async def _take_back(self, tenant: str, file_id: str, writing: asyncio.Task[None]) -> None:
        await asyncio.wait((writing,))
        if writing.exception() is None:
            await self.store.delete(_record_id(tenant, file_id))

    async def get(self, tenant: str, file_id: str, *, param: str = "file_id") -> StoredFile:
        """Raises ApiError 404, which names `param`, where the tenant has no such file, or has it no more."""
        file = _decoded(await self._value(tenant, file_id, param))
        if file is None:
            raise _unknown(param)
        return file

    async def _value(self, tenant: str, file_id: str, param: str) -> bytes:
        value = await self.store.get(_record_id(tenant, file_id)) if _FILE_ID.fullmatch(file_id) else None
        if value is None:
            raise _unknown(param)
        return value

    async def content(self, tenant: str, file_id: str) -> bytes:
        """The bytes that were uploaded, which count for the request of the moment until it ends. Raises as `get`, and BudgetFullError."""
        await hold_bytes((await self.get(tenant, file_id)).num_bytes)
        return await self._read(tenant, file_id, "file_id")

    async def _read(self, tenant: str, file_id: str, param: str) -> bytes:
        parts = await self.store.get_parts(_record_id(tenant, file_id), [_CONTENT])
        if _CONTENT not in parts:
            raise _unknown(param)
        return parts[_CONTENT]

    async def all(self, tenant: str) -> list[StoredFile]:
        """The tenant's files, oldest first."""
        values = await self.store.values(NAMESPACE, tenant)
        files = [file for value in values.values() if (file := _decoded(value)) is not None]
        return sorted(files, key=lambda file: (file.created_s, file.id))

    async def delete(self, tenant: str, file_id: str) -> None:
        """Raises as `get`."""
        await self._value(tenant, file_id, "file_id")
        await self.store.delete(_record_id(tenant, file_id))

    async def take(
        self, images: Iterable[tuple[str, Image]], *, tenant: str, lost: dict[str, MediaError] | None = None
    ) -> dict[str, bytes]:
        """The bytes of the files that `images` name, by the URL that is put into each image in its file id's place.

        images: those with a file id, each with its path in the request. Raises ApiError 404 for the first id that the tenant does not
        have, and 400 where the files together have too many bytes; BudgetFullError where all requests together do. lost: is given the
        error of each such id instead, by the URL.
        """
        pictures: dict[str, bytes] = {}
        room_bytes = self.max_request_bytes
        for path, image in images:
            file_id = image.pop("file_id")
            image["url"] = url = URL_SCHEME + file_id
            if url in pictures or url in (lost or {}):
                continue
            param = f"{path}.file_id"
            try:
                num_bytes = (await self.get(tenant, file_id, param=param)).num_bytes
                room_bytes -= num_bytes
                self._require_room(room_bytes, param)
                await hold_bytes(num_bytes)
                pictures[url] = await self._read(tenant, file_id, param)
            except ApiError as error:
                if lost is None or error.status != 404:
                    raise
                lost[url] = MediaError(error.code, error.message.removeprefix(f"{param}: "), status=error.status)
        return pictures

    async def _write(self, tenant: str, file: StoredFile, data: bytes, ttl_s: float) -> None:
        value = msgspec.msgpack.encode(file)
        try:
            await self.store.add(_record_id(tenant, file.id), value, parts={_CONTENT: data}, ttl_s=ttl_s, quota=self.quota)
        except QuotaError as error:
            raise self._over_quota(error) from error

    def _over_quota(self, error: QuotaError) -> ApiError:
        """413 and not 429, which clients take for a reason to send the same again."""
        quota = self.quota
        message = (
            f"file: this API key has {error.num_records} files with {error.num_bytes} bytes; at most {quota.max_records} files "
            f"(--max-files) with {quota.max_bytes} bytes (--max-file-bytes-per-key) are allowed; delete some, or wait until they expire"
        )
        return ApiError(413, "file_quota_exceeded", message, param="file")

    def _require_room(self, room_bytes: int, param: str) -> None:
        if room_bytes < 0:
            limit = f"only {self.max_request_bytes} bytes are allowed (--max-body-bytes)"
            raise bad_request("image_too_large", f"{param}: the files that this request names are too large together; {limit}", param=param)


def images_in(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Image]]:
    """Every picture of a conversation that is named by a file id, with its path in the request."""
    for number, message in enumerate(messages):
        yield from images_in_parts(message.get("content"), f"messages[{number}].content")


def images_in_parts(content: object, path: str) -> Iterator[tuple[str, Image]]:
    """As `images_in`, of one list of parts."""
    for index, part in enumerate(content if isinstance(content, list) else ()):
        if part["type"] == "image_url" and "file_id" in part["image_url"]:
            yield f"{path}[{index}].image_url", part["image_url"]


def _decoded(value: bytes) -> StoredFile | None:
    """None where another version of this server wrote it."""
    try:
        return msgspec.msgpack.decode(value, type=StoredFile)
    except msgspec.MsgspecError:
        logger.warning("a file's record cannot be read; it ends in time, or when it is deleted")
        return None


def _record_id(tenant: str, file_id: str) -> RecordId:
    return RecordId(NAMESPACE, tenant, file_id)


def _unknown(param: str) -> ApiError:
    return ApiError(404, "file_not_found", f"{param}: this API key has no such file; it may have expired", param=param)
