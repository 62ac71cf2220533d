"""What a store of records promises, whatever keeps it.

A record is one value and named parts, all bytes, under a namespace, a tenant and a key. It ends after a time without a write, or when its
tenant has too many, or too much, in its namespace. A lease on a record lets one writer at a time work on it, on whichever server; a lease
that is not renewed ends by itself. Knows nothing of what the bytes mean.

A namespace's records are written either with `put`, where old records make room for new ones, or with `add`, which refuses what is too
much.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

MAX_KEPT_BYTES = 1 << 30  # a small request that continues a conversation keeps all of it again


class StoreError(Exception):
    """The store cannot be opened, reached, read or written."""


class StoreFullError(StoreError):
    """There is no room for what was to be written; nothing was."""

    def __init__(self) -> None:
        super().__init__("the session store is full: nothing can be kept until there is room again; requests that keep nothing work")


class UnreadableRecordError(StoreError):
    """A record that is there can never be used: another version wrote it, or it lost a part. The message begins with its field."""


class LeaseLostError(Exception):
    """The lease ended before the write: it was revoked, or not renewed in time. Nothing was written."""


class QuotaError(Exception):
    """The tenant would have more than its quota. Nothing was written."""

    def __init__(self, num_records: int, num_bytes: int) -> None:
        super().__init__(f"{num_records} records with {num_bytes} bytes are kept")
        self.num_records = num_records  # before
        self.num_bytes = num_bytes


@dataclass(frozen=True, slots=True)
class RecordId:
    namespace: str
    tenant: str
    key: str


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a record stays after its last write; how many of them, with how many bytes together, one tenant has in one namespace."""

    ttl_s: float
    max_records: int
    max_bytes: int = MAX_KEPT_BYTES

    def num_kept(self, sizes: Sequence[int]) -> int:
        """How many of a tenant's records stay. sizes: theirs, the newest first, which stays whatever its own."""
        num_fitting = sum(num_bytes <= self.max_bytes for num_bytes in accumulate(sizes))
        return max(1, min(self.max_records, num_fitting))


@dataclass(frozen=True, slots=True)
class Quota:
    """What one tenant may have in one namespace: records, and bytes of all their parts together."""

    max_records: int
    max_bytes: int

    def require(self, new_bytes: int, *, num_records: int, num_bytes: int) -> None:
        """Raises QuotaError where one more record with `new_bytes` would be too much beside those that are there."""
        if num_records + 1 > self.max_records or num_bytes + new_bytes > self.max_bytes:
            raise QuotaError(num_records, num_bytes)


class RecordStore(Protocol):
    """Every method may raise StoreError, none waits without a limit."""

    async def get(self, record_id: RecordId) -> bytes | None:
        """The value of a record that has not ended."""

    async def get_parts(self, record_id: RecordId, names: Collection[str]) -> dict[str, bytes]:
        """Those of the named parts that a record has which has not ended."""

    async def num_bytes(self, record_id: RecordId) -> int | None:
        """Of a record that has not ended, its value and all of its parts, which are not read for it."""

    async def put(self, record_id: RecordId, value: bytes, *, parts: Mapping[str, bytes], limits: Limits, token: str | None = None) -> None:
        """Write the value, and the parts that the record does not have yet, all or nothing; then end the tenant's oldest surplus records.

        token: of the lease that must hold, else LeaseLostError.
        """

    async def add(self, record_id: RecordId, value: bytes, *, parts: Mapping[str, bytes], ttl_s: float, quota: Quota) -> None:
        """Write a record that is not there yet, for `ttl_s`; all or nothing, and nothing else ends for it.

        Raises QuotaError. Whoever adds at the same time, on whichever server, a tenant never has more than its quota.
        """

    async def values(self, namespace: str, tenant: str) -> dict[str, bytes]:
        """The values of the tenant's records by their keys, in no order."""

    async def delete(self, record_id: RecordId, *, token: str | None = None) -> None:
        """End the record, if there is one. `token` as for `put`."""

    async def count(self, namespace: str) -> int:
        """Records of all tenants."""

    async def acquire(self, record_id: RecordId, token: str, *, lifetime_s: float) -> bool:
        """Take the lease on a record, which need not exist; False where another token has it."""

    async def renew(self, record_id: RecordId, token: str, *, lifetime_s: float) -> bool:
        """Let the lease last `lifetime_s` from now; False where it is lost."""

    async def release(self, record_id: RecordId, token: str) -> None:
        """Give the lease back, if it is still this token's."""

    async def revoke(self, record_id: RecordId) -> None:
        """End the lease, whoever has it."""

    async def close(self) -> None: ...
