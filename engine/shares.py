"""What one tenant may hold of the batch and of the KV cache while others wait, and which of its rows make way for them.

Three quarters of the rows, and of the blocks, are a tenant's share. It may hold more while nobody else wants it. A waiting request takes
rows from a tenant that holds more than its share; one whose tenant holds nothing takes them from any that has two. A tenant's oldest row
never makes way, and no row of a beam search, which would stand still without it. Requests without a tenant are nobody's share.
Knows nothing of pictures, of prefill or of who comes first.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from engine.kv_cache import BlockManager
from engine.row import Row


@dataclass(slots=True)
class Holding:
    """What a tenant's running rows hold. A block that several of them share counts for each."""

    num_rows: int = 0
    num_blocks: int = 0
    num_beams: int = 0  # of the rows, those of beam searches


@dataclass(frozen=True, slots=True)
class Want:
    """What a waiting row needs to run."""

    row: Row
    num_rows: int  # more than one for a beam search
    num_blocks: int

    @property
    def tenant(self) -> str:
        return self.row.tenant


class Shares:
    def __init__(self, max_batch_size: int, blocks: BlockManager) -> None:
        self.max_rows = _share(max_batch_size)
        self.max_blocks = _share(blocks.num_blocks)
        self._blocks = blocks

    def holdings(self, running: Iterable[Row], reserved: Iterable[tuple[str, int]]) -> dict[str, Holding]:
        """By tenant. reserved: tenants, and how many more rows their searches will be."""
        holdings: dict[str, Holding] = {}
        for row in running:
            holding = holdings.setdefault(row.tenant, Holding())
            holding.num_rows += 1
            holding.num_beams += row.is_beam
            holding.num_blocks += len(row.table.block_ids)
        for tenant, num_rows in reserved:
            holding = holdings.setdefault(tenant, Holding())
            holding.num_rows += num_rows
            holding.num_beams += num_rows
        return holdings

    def is_exceeded(self, holding: Holding | None, want: Want) -> bool:
        """Whether the tenant would hold more than its share with it. Its only request never is too much."""
        if not want.tenant or holding is None:
            return False
        return holding.num_rows + want.num_rows > self.max_rows or holding.num_blocks + want.num_blocks > self.max_blocks

    def is_exceeded_by_beams(self, holding: Holding | None, want: Want) -> bool:
        """Whether the tenant would hold more than its share in rows that never make way."""
        if not want.tenant or want.num_rows == 1 or holding is None or holding.num_beams == 0:
            return False
        return holding.num_beams + want.num_rows > self.max_rows

    def rows_for(
        self, want: Want, running: Sequence[Row], holdings: Mapping[str, Holding], *, num_rows: int, num_blocks: int
    ) -> list[Row] | None:
        """Who makes way so that there are so many more rows and blocks; None where it would be in vain."""
        left = {tenant: replace(holding) for tenant, holding in holdings.items()}
        given: list[Row] = []
        while num_rows > 0 or num_blocks > 0:
            row = self._next(want, [row for row in running if row not in given], left, has_rows=num_rows <= 0)
            if row is None:
                return None
            given.append(row)
            left[row.tenant].num_rows -= 1
            left[row.tenant].num_blocks -= len(row.table.block_ids)
            num_rows -= 1
            num_blocks -= self._blocks.num_owned(row.table) + 1  # the one that is left over for each running row
        return given

    def _next(self, want: Want, running: Sequence[Row], holdings: Mapping[str, Holding], *, has_rows: bool) -> Row | None:
        """The youngest row of the tenant that holds most of what is lacking."""

        def held(row: Row) -> int:
            return holdings[row.tenant].num_blocks if has_rows else holdings[row.tenant].num_rows

        takes_any = want.num_rows == 1 and want.tenant not in holdings
        limit = 0 if takes_any else self.max_blocks if has_rows else self.max_rows
        may_give = [
            row
            for row in running
            if row.tenant not in ("", want.tenant) and not row.is_beam and holdings[row.tenant].num_rows > 1 and held(row) > limit
        ]
        return max(reversed(may_give), key=lambda row: (held(row), row.order), default=None)


def youngest_of_most_blocks(running: Sequence[Row]) -> Row:
    """Who is preempted where blocks are short: of the tenant that holds most of them. Never the oldest of all, so that it gets on."""
    num_blocks: dict[str, int] = {}
    for row in running:
        num_blocks[row.tenant] = num_blocks.get(row.tenant, 0) + len(row.table.block_ids)
    return max(reversed(running[1:] or running), key=lambda row: (num_blocks[row.tenant], row.order))


def _share(whole: int) -> int:
    return max(1, whole - whole // 4)
