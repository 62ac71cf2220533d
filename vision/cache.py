"""A least recently used cache, bounded in bytes and in entries. Does not know what its values are; who puts one in says what it weighs."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ByteBoundedCache(Generic[Key, Value]):
    """The values that were used last, at most `capacity_bytes` and `max_entries` of them."""

    def __init__(self, capacity_bytes: int, *, max_entries: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0
        self._max_entries = max_entries
        self._entries: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Value | None:
        entry = self._entries.get(key)
        if entry is None:
            self.num_misses += 1
            return None
        self.num_hits += 1
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Key, value: Value, num_bytes: int) -> None:
        """Replaces the key's value. A value that is larger than the whole cache is not kept."""
        self.discard(key)
        if num_bytes > self.capacity_bytes:
            return
        self._entries[key] = (value, num_bytes)
        self.num_bytes += num_bytes
        while self.num_bytes > self.capacity_bytes or (self._max_entries is not None and len(self._entries) > self._max_entries):
            _, (_, freed_bytes) = self._entries.popitem(last=False)
            self.num_bytes -= freed_bytes

    def discard(self, key: Key) -> None:
        """Forgets the key's value, if there is one."""
        if key in self._entries:
            self.num_bytes -= self._entries.pop(key)[1]

    def clear(self) -> None:
        self._entries.clear()
        self.num_bytes = 0
