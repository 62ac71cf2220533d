"""The block manager by example, and under random operations beside a naive model of the cache's contents."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine.kv_cache import BlockManager, BlockTable

SIZE = 4


def make_table(keys: list[int]) -> BlockTable:
    return BlockTable(list(keys))


def fill(blocks: BlockManager, keys: list[int]) -> BlockTable:
    """A table whose slots are all computed and published."""
    table = make_table(keys)
    assert blocks.allocate(table, len(keys), num_matched=blocks.match(table))
    blocks.commit(table, len(keys))
    return table


def state(blocks: BlockManager) -> tuple[int, int, int]:
    blocks.check()
    return blocks.num_referenced, blocks.num_cached, blocks.num_free


def test_every_new_block_is_free() -> None:
    assert state(BlockManager(5, SIZE)) == (0, 0, 5)


def test_full_computed_blocks_stay_cached_after_their_user() -> None:
    blocks = BlockManager(8, SIZE)

    table = fill(blocks, list(range(10)))
    assert state(blocks) == (3, 0, 5)
    blocks.free(table)

    assert state(blocks) == (0, 2, 6)


def test_blocks_that_are_not_computed_are_not_published() -> None:
    blocks = BlockManager(8, SIZE)
    table = make_table(list(range(12)))
    blocks.allocate(table, 12)

    blocks.commit(table, 7)

    assert blocks.match(make_table(list(range(12)))) == 1
    blocks.free(table)
    assert state(blocks) == (0, 1, 7)


def test_a_second_request_takes_the_same_blocks_as_far_as_the_keys_agree() -> None:
    blocks = BlockManager(8, SIZE)
    first = fill(blocks, list(range(12)))

    second = fill(blocks, [*range(8), 99, 99, 99, 99])

    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.block_ids[2] != first.block_ids[2]
    assert state(blocks) == (4, 0, 4)


def test_a_match_leaves_one_slot_to_compute() -> None:
    blocks = BlockManager(8, SIZE)
    fill(blocks, list(range(8)))

    assert blocks.match(make_table(list(range(8)))) == 1
    assert blocks.match(make_table(list(range(9)))) == 2


def test_equal_blocks_after_different_beginnings_are_different() -> None:
    blocks = BlockManager(8, SIZE)
    fill(blocks, [1, 1, 1, 1, 2, 2, 2, 2])

    assert blocks.match(make_table([3, 3, 3, 3, 2, 2, 2, 2, 0])) == 0


def test_large_and_negative_keys_are_told_apart() -> None:
    blocks = BlockManager(8, SIZE)
    fill(blocks, [-(2**63), -1, 2**63 - 1, 0])

    assert blocks.match(make_table([-(2**63), -1, 2**63 - 1, 0, 0])) == 1
    assert blocks.match(make_table([-(2**63) + 1, -1, 2**63 - 1, 0, 0])) == 0


def test_nothing_is_matched_without_prefix_caching() -> None:
    blocks = BlockManager(8, SIZE, enable_prefix_caching=False)

    table = fill(blocks, list(range(9)))

    assert blocks.match(make_table(list(range(9)))) == 0
    assert blocks.next_digest(make_table(list(range(9))), 0) is None
    blocks.free(table)
    assert state(blocks) == (0, 0, 8)


def test_the_least_recently_used_chain_is_evicted_first_and_its_tail_before_its_head() -> None:
    blocks = BlockManager(4, SIZE)
    old, new = [1] * 8, [2] * 8
    blocks.free(fill(blocks, old))
    blocks.free(fill(blocks, new))

    taken = make_table([3] * 4)
    blocks.allocate(taken, 4)

    assert (blocks.match(make_table([*old, 0])), blocks.match(make_table([*new, 0]))) == (1, 2)
    more = make_table([4] * 8)
    blocks.allocate(more, 8)
    assert (blocks.match(make_table([*old, 0])), blocks.match(make_table([*new, 0]))) == (0, 1)
    assert state(blocks) == (3, 1, 0)


def test_use_makes_a_chain_young_again() -> None:
    blocks = BlockManager(4, SIZE)
    blocks.free(fill(blocks, [1] * 8))
    blocks.free(fill(blocks, [2] * 8))
    blocks.free(fill(blocks, [1] * 8))

    blocks.allocate(make_table([3] * 8), 8)

    assert (blocks.match(make_table([1] * 9)), blocks.match(make_table([2] * 9))) == (2, 0)


def test_allocation_that_does_not_fit_changes_nothing() -> None:
    blocks = BlockManager(4, SIZE)
    blocks.free(fill(blocks, [1] * 8))
    table = make_table([1] * 20)

    assert not blocks.allocate(table, 20, num_matched=2)
    assert not blocks.allocate(make_table([1] * 16), 16, num_matched=2, num_spare=1)

    assert table.block_ids == []
    assert state(blocks) == (0, 2, 2)


def test_cached_blocks_that_are_matched_do_not_count_as_room() -> None:
    blocks = BlockManager(2, SIZE)
    blocks.free(fill(blocks, [1] * 8))

    assert not blocks.allocate(make_table([1] * 12), 12, num_matched=2)
    assert blocks.allocate(make_table([1] * 8), 8, num_matched=2)


def test_append_takes_a_block_when_the_last_one_is_full() -> None:
    blocks = BlockManager(2, SIZE)
    table = make_table([1] * 4)
    blocks.allocate(table, 4)

    assert blocks.append(table, 3, 4) == []
    assert state(blocks) == (1, 0, 1)
    assert blocks.append(table, 4, 5) == []
    assert state(blocks) == (2, 0, 0)
    assert blocks.append(table, 8, 9) is None
    assert state(blocks) == (2, 0, 0)


def test_a_fork_shares_all_computed_blocks_and_the_first_writer_copies_the_partial_one() -> None:
    blocks = BlockManager(8, SIZE)
    parent = make_table([1] * 6)
    blocks.allocate(parent, 6)
    child = make_table([1] * 6)
    blocks.fork(parent, child, 6)
    shared = parent.block_ids[1]
    assert child.block_ids == parent.block_ids
    assert state(blocks) == (2, 0, 6)

    copies = blocks.append(child, 6, 7)

    assert copies == [(shared, child.block_ids[1])]
    assert child.block_ids[1] != shared
    assert blocks.append(parent, 6, 7) == []
    assert parent.block_ids[1] == shared
    assert state(blocks) == (3, 0, 5)


def test_a_fork_at_a_block_border_copies_nothing() -> None:
    blocks = BlockManager(8, SIZE)
    parent = make_table([1] * 10)
    blocks.allocate(parent, 10)
    child = make_table([1] * 10)
    blocks.fork(parent, child, 8)

    assert blocks.append(child, 8, 9) == []
    assert child.block_ids[:2] == parent.block_ids[:2]
    assert child.block_ids[2] != parent.block_ids[2]


def test_a_fork_of_less_than_is_published_publishes_its_own_blocks() -> None:
    blocks = BlockManager(8, SIZE)
    parent = fill(blocks, [1] * 8)
    child = make_table([1, 1, 1, 1, 2, 2, 2, 2])
    blocks.fork(parent, child, 4)

    blocks.append(child, 4, 8)
    blocks.commit(child, 8)

    assert blocks.match(make_table([1, 1, 1, 1, 2, 2, 2, 2, 0])) == 2
    assert state(blocks) == (3, 0, 5)


def test_a_freed_table_can_be_filled_anew() -> None:
    blocks = BlockManager(8, SIZE)
    table = fill(blocks, [1] * 8)
    blocks.free(table)
    blocks.free(fill(blocks, [2] * 32))

    blocks.append(table, 0, 8)
    blocks.commit(table, 8)

    assert blocks.match(make_table([1] * 9)) == 2


def test_a_copy_that_does_not_fit_changes_nothing() -> None:
    blocks = BlockManager(1, SIZE)
    parent, child = make_table([1] * 2), make_table([1] * 2)
    blocks.allocate(parent, 2)
    blocks.fork(parent, child, 2)

    assert blocks.append(child, 2, 3) is None

    assert child.block_ids == parent.block_ids
    blocks.free(parent)
    assert blocks.append(child, 2, 3) == []


def test_blocks_that_a_table_has_beyond_its_need_do_not_count_as_room_for_a_copy() -> None:
    blocks = BlockManager(4, SIZE)
    parent, child = make_table([1] * 16), make_table([1] * 6)
    blocks.allocate(parent, 16)
    blocks.fork(parent, child, 6)

    assert blocks.append(parent, 6, 7) is None
    assert parent.block_ids[:2] == child.block_ids


def test_of_two_that_computed_the_same_block_the_second_takes_the_firsts() -> None:
    blocks = BlockManager(8, SIZE)
    first, second = make_table([1] * 5), make_table([1] * 5)
    blocks.allocate(first, 5)
    blocks.allocate(second, 5)

    blocks.commit(first, 5)
    blocks.commit(second, 5)

    assert first.block_ids[0] == second.block_ids[0]
    assert state(blocks) == (3, 0, 5)


def test_the_check_notices_a_lost_and_a_doubly_counted_block() -> None:
    for break_it in (
        lambda blocks: blocks._free.pop(),
        lambda blocks: blocks._free.append(0),
        lambda blocks: blocks._num_references.__setitem__(0, 2),
        lambda blocks: blocks._block_of.clear(),
        lambda blocks: blocks._digest_of.__setitem__(7, b"x"),
    ):
        blocks = BlockManager(8, SIZE)
        fill(blocks, [1] * 6)
        blocks.check()

        break_it(blocks)

        with pytest.raises(AssertionError, match="references"):
            blocks.check()


class Blocks(RuleBasedStateMachine):
    """Random requests over a small alphabet of prefixes, beside what each block holds when only the writes are looked at.

    `contents` has, for every block, the keys of the slots written to it since it was given out, together with all keys before them: so a
    block that is matched although it holds something else, or is overwritten while another reads it, is seen.
    """

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(10, 2)
        self.contents: dict[int, list[tuple[int, ...]]] = {}  # block → for each of its slots all keys up to it
        self.live: dict[BlockTable, int] = {}  # table → computed slots

    def write(self, table: BlockTable, first: int, last: int) -> None:
        for slot in range(first, last):
            block_id = table.block_ids[slot // 2]
            users = [other for other in self.live if block_id in other.block_ids]
            assert users == [table], "written while shared"
            assert self.blocks._digest_of[block_id] is None, "written while published"
            self.contents.setdefault(block_id, [(), ()])[slot % 2] = tuple(table.cache_keys[: slot + 1])

    @rule(target=tables, keys=st.lists(st.sampled_from([-5, 7]), min_size=1, max_size=12), spare=st.integers(0, 2))
    def add(self, keys: list[int], spare: int) -> BlockTable:
        table = make_table(keys)
        num_matched = self.blocks.match(table)
        assert num_matched == self.longest_cached_run(keys)
        before = self.blocks.num_available
        if self.blocks.allocate(table, len(keys), num_matched=num_matched, num_spare=spare):
            self.live[table] = num_matched * 2
            assert self.blocks.num_available >= spare
        else:
            assert self.blocks.num_available == before
            assert table.block_ids == []
        return table

    def longest_cached_run(self, keys: list[int]) -> int:
        """From nothing but what published blocks hold."""
        published = {self.contents[block_id][1] for block_id, digest in enumerate(self.blocks._digest_of) if digest is not None}
        num_matched = 0
        while (num_matched + 1) * 2 < len(keys) and tuple(keys[: (num_matched + 1) * 2]) in published:
            num_matched += 1
        return num_matched

    @rule(table=tables, count=st.integers(1, 5))
    def compute(self, table: BlockTable, count: int) -> None:
        if table not in self.live:
            return
        start, end = self.live[table], min(len(table.cache_keys), self.live[table] + count)
        copies = self.blocks.append(table, start, end)
        if copies is not None:
            for source, target in copies:
                self.contents[target] = list(self.contents[source])
            self.write(table, start, end)
            self.live[table] = end

    @rule(table=tables)
    def commit(self, table: BlockTable) -> None:
        if table in self.live:
            self.blocks.commit(table, self.live[table])

    @rule(table=tables, key=st.sampled_from([-5, 7]))
    def grow(self, table: BlockTable, key: int) -> None:
        table.cache_keys.append(key)

    @rule(target=tables, parent=tables)
    def fork(self, parent: BlockTable) -> BlockTable:
        child = make_table(parent.cache_keys)
        if parent in self.live:
            self.blocks.fork(parent, child, self.live[parent])
            self.live[child] = self.live[parent]
        return child

    @rule(table=consumes(tables))
    def free(self, table: BlockTable) -> None:
        self.blocks.free(table)
        self.live.pop(table, None)

    @invariant()
    def every_block_is_in_one_state(self) -> None:
        self.blocks.check()
        assert self.blocks.num_referenced + self.blocks.num_cached + self.blocks.num_free == 10
        assert self.blocks.num_referenced == len({block_id for table in self.live for block_id in table.block_ids})

    @invariant()
    def every_table_reads_what_it_would_have_written(self) -> None:
        for table, num_computed in self.live.items():
            for slot in range(num_computed):
                assert self.contents[table.block_ids[slot // 2]][slot % 2] == tuple(table.cache_keys[: slot + 1])

    @invariant()
    def the_parent_of_a_published_block_is_published(self) -> None:
        published = {self.contents[block_id][1] for block_id, digest in enumerate(self.blocks._digest_of) if digest is not None}
        assert all(len(keys) == 2 or keys[:-2] in published for keys in published)

    def teardown(self) -> None:
        for table in self.live:
            self.blocks.free(table)
        self.blocks.check()
        assert self.blocks.num_referenced == 0


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
