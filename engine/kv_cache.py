"""Which blocks of the KV cache hold which slots of which request.

A block is `block_size` slots. A full, computed block is published under a hash of all cache keys up to its end, so that another request
with the same beginning takes it instead of computing it. Knows nothing of tensors, of tokens or of images: cache keys are plain integers.
"""

import hashlib
import struct
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

_ROOT = b"\0" * 16  # parent digest of a request's first block


@dataclass(slots=True, eq=False)
class BlockTable:
    """One request's blocks, in slot order. Made by its owner, changed by the `BlockManager` alone."""

    cache_keys: list[int]  # the owner's list, one key per slot, only ever appended to
    block_ids: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of the first full blocks; each block is hashed once
    num_published: int = 0  # leading blocks that are in the prefix cache
    match_hint: int = 0  # what `match` found last
    is_private: bool = False  # takes nothing from the prefix cache and puts nothing there


class BlockManager:
    """Gives blocks out, counts their references, remembers published ones after their last user, evicts the least recently used.

    Every block is in exactly one state: referenced (by one table or more), cached (published, no user) or free (holds nothing).
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first; a chain's tail before its head
        self._num_references = [0] * num_blocks
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._tables: set[BlockTable] = set()  # those that hold blocks
        self._pack = struct.Struct(f"<{block_size}q").pack

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_referenced(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that can be given out now: free ones, then cached ones."""
        return len(self._free) + len(self._cached)

    def num_blocks_for(self, num_slots: int) -> int:
        return -(-num_slots // self.block_size)

    def match(self, table: BlockTable) -> int:
        """The number of leading blocks of `table.cache_keys` that are published; at least one slot is left to compute.

        A published block's parent is always published too, so the search goes on from where the last one ended.
        """
        if not self._shares(table):
            return 0
        num_matched, limit = table.match_hint, self._max_matched(table)
        while num_matched and self._digest(table, num_matched - 1) not in self._block_of:
            num_matched -= 1
        while num_matched < limit and self._digest(table, num_matched) in self._block_of:
            num_matched += 1
        table.match_hint = num_matched
        return num_matched

    def next_digest(self, table: BlockTable, num_matched: int) -> bytes | None:
        """The hash of the block after the first `num_matched`, where `match` could ever find it."""
        if self._shares(table) and num_matched < self._max_matched(table):
            return self._digest(table, num_matched)
        return None

    def digests(self, table: BlockTable, first: int) -> list[bytes]:
        """The hashes of all full blocks of `table.cache_keys` from the block `first` on; none without prefix caching."""
        if not self._shares(table):
            return []
        return [self._digest(table, index) for index in range(first, len(table.cache_keys) // self.block_size)]

    def allocate(self, table: BlockTable, num_slots: int, *, num_matched: int = 0, num_spare: int = 0) -> bool:
        """Give an empty table its first `num_matched` published blocks and new ones up to `num_slots` slots.

        False, and nothing changed, where fewer than `num_spare` blocks would be left available.
        """
        assert table not in self._tables, f"allocate on a table that holds {table.block_ids}"
        if self.num_available - self.num_taken(table, num_slots, num_matched) < num_spare:
            return False
        matched = [self._block_of[self._digest(table, index)] for index in range(num_matched)]
        num_new = self.num_blocks_for(num_slots) - num_matched
        for block_id in matched:
            self._reference(block_id)
        table.block_ids += matched
        table.block_ids += [self._take() for _ in range(num_new)]
        table.num_published = num_matched
        self._tables.add(table)
        return True

    def num_taken(self, table: BlockTable, num_slots: int, num_matched: int) -> int:
        """How many of the available blocks `allocate` would take."""
        matched = [self._block_of[self._digest(table, index)] for index in range(num_matched)]
        return self.num_blocks_for(num_slots) - num_matched + sum(self._num_references[block_id] == 0 for block_id in matched)

    def num_owned(self, table: BlockTable) -> int:
        """Blocks that are available again when the table is freed: those that no other one holds."""
        return sum(self._num_references[block_id] == 1 for block_id in table.block_ids)

    def append(self, table: BlockTable, num_computed: int, num_slots: int) -> list[tuple[int, int]] | None:
        """Make the slots `num_computed … num_slots` writable: new blocks at the end, own copies of shared ones.

        Returns the (from, to) pairs whose contents must be copied before the write; None, and nothing changed, where blocks are short.
        """
        block_ids = table.block_ids
        num_new = max(0, self.num_blocks_for(num_slots) - len(block_ids))
        first = num_computed // self.block_size
        shared = [index for index in range(first, len(block_ids)) if self._num_references[block_ids[index]] > 1]
        if num_new + len(shared) > self.num_available:
            return None
        copies = [(block_ids[index], self._take()) for index in shared]
        for index, (source, target) in zip(shared, copies, strict=True):
            block_ids[index] = target
            self._release(source)
        for _ in range(num_new):
            block_ids.append(self._take())
        self._tables.add(table)
        return copies

    def commit(self, table: BlockTable, num_computed: int) -> list[bytes]:
        """Publish the blocks that `num_computed` slots fill; returns the hashes of those that are new to this table.

        Where another request published the same block meanwhile, the table takes that one and gives its own back.
        """
        if not self._shares(table):
            return []
        first, table.num_published = table.num_published, max(table.num_published, num_computed // self.block_size)
        return [self._publish(table, index) for index in range(first, table.num_published)]

    def fork(self, parent: BlockTable, child: BlockTable, num_computed: int) -> None:
        """Let an empty `child` share the parent's first `num_computed` slots; whoever writes first into a shared block copies it."""
        assert child not in self._tables, f"fork into a table that holds {child.block_ids}"
        assert child.cache_keys[:num_computed] == parent.cache_keys[:num_computed], "fork into a table with other cache keys"
        child.block_ids += parent.block_ids[: self.num_blocks_for(num_computed)]
        child.digests[:] = parent.digests[: num_computed // self.block_size]
        child.num_published = min(parent.num_published, num_computed // self.block_size)
        for block_id in child.block_ids:
            self._reference(block_id)
        self._tables.add(child)

    def free(self, table: BlockTable) -> None:
        """Give all of the table's blocks back. Published ones stay cached, tails to be evicted before heads."""
        for block_id in reversed(table.block_ids):
            self._release(block_id)
        table.block_ids.clear()
        table.num_published = 0
        self._tables.discard(table)

    def check(self) -> None:
        """Raises AssertionError, with the state, where a block was lost, shared wrongly or counted twice."""
        counted = Counter(block_id for table in self._tables for block_id in table.block_ids)
        state = (
            f"free {sorted(self._free)}, cached {list(self._cached)}, published {sorted(self._block_of.values())}, "
            f"references {self._num_references}, tables {[table.block_ids for table in self._tables]}"
        )
        assert [counted[block_id] for block_id in range(self.num_blocks)] == self._num_references, f"references differ: {state}"
        parts = sorted([*self._free, *self._cached, *counted])
        assert parts == list(range(self.num_blocks)), f"a block is in no state or in two: {state}"
        published = {block_id: digest for block_id, digest in enumerate(self._digest_of) if digest is not None}
        assert published == {block_id: digest for digest, block_id in self._block_of.items()}, f"the hash table is wrong: {state}"
        assert all(block_id in published for block_id in self._cached), f"a cached block is not published: {state}"
        assert not any(block_id in published for block_id in self._free), f"a free block is published: {state}"
        for table in self._tables:
            blocks = table.block_ids[: table.num_published]
            assert len(set(table.block_ids)) == len(table.block_ids), f"a table holds a block twice: {state}"
            assert [published.get(block_id) for block_id in blocks] == table.digests[: len(blocks)], f"a block has another's hash: {state}"

    def _shares(self, table: BlockTable) -> bool:
        return self.enable_prefix_caching and not table.is_private

    def _max_matched(self, table: BlockTable) -> int:
        return (len(table.cache_keys) - 1) // self.block_size

    def _digest(self, table: BlockTable, index: int) -> bytes:
        digests, size = table.digests, self.block_size
        while len(digests) <= index:
            start = len(digests) * size
            keys = self._pack(*table.cache_keys[start : start + size])
            digests.append(hashlib.blake2b((digests[-1] if digests else _ROOT) + keys, digest_size=16).digest())
        return digests[index]

    def _publish(self, table: BlockTable, index: int) -> bytes:
        digest, block_id = self._digest(table, index), table.block_ids[index]
        published = self._block_of.setdefault(digest, block_id)
        if published == block_id:
            self._digest_of[block_id] = digest
        else:
            self._reference(published)
            table.block_ids[index] = published
            self._release(block_id)
        return digest

    def _take(self) -> int:
        """A block for one user's writing: a free one, or the least recently used cached one."""
        if self._free:
            block_id = self._free.pop()
        else:
            block_id, _ = self._cached.popitem(last=False)
            digest = self._digest_of[block_id]
            assert digest is not None, f"cached block {block_id} has no hash"
            del self._block_of[digest]
            self._digest_of[block_id] = None
        self._num_references[block_id] = 1
        return block_id

    def _reference(self, block_id: int) -> None:
        if self._num_references[block_id] == 0:
            del self._cached[block_id]
        self._num_references[block_id] += 1

    def _release(self, block_id: int) -> None:
        self._num_references[block_id] -= 1
        if self._num_references[block_id] > 0:
            return
        if self._digest_of[block_id] is None:
            self._free.append(block_id)
        else:
            self._cached[block_id] = None
