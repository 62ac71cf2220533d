"""What one tenant may hold of the batch and of the KV cache while others wait, and which of its rows make way for them.

Three quarters of the rows, and of the blocks, are a tenant's share. It may hold more while nobody else wants it. A waiting request takes
rows from a tenant that holds more than its share; one whose tenant holds nothing takes them from any that has two. A tenant's last row
never makes way, and no row of a beam search, all of which would have to go. Requests without a tenant are nobody's share.
Knows nothing of pictures, of prefill or of who comes first.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from engine.kv_cache import BlockManager
from engine.request import RequestStatus
from engine.row import Row
from engine.searches import Searches


@dataclass(slots=True)
class _Holding:
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
    """Who lets whom pass, for one scheduler. `begin` and `end` enclose each of its steps."""

    def __init__(self, max_batch_size: int, blocks: BlockManager, running: Sequence[Row], searches: Searches) -> None:
        """running: the scheduler's own list, in order."""
        self._max_batch_size = max_batch_size
        self._max_rows = _share(max_batch_size)
        self._max_blocks = _share(blocks.num_blocks)
        self._blocks = blocks
        self._running = running
        self._searches = searches
        self._holdings: dict[str, _Holding] | None = None  # what `_held` counted, until rows come or go
        self._wants: Sequence[Want] = ()  # of this step: what the first row of each tenant that could start needs
        self._promised: list[Want] = []  # those of them for whom there is room

    @property
    def num_free_rows(self) -> int:
        """Those counted as taken that beam searches will fork."""
        return self._max_batch_size - len(self._running) - sum(num_rows for _, num_rows in self._searches.reserved())

    def want(self, row: Row, num_matched: int) -> Want:
        """num_matched: leading blocks of the row that need not be computed."""
        num_blocks = self._blocks.num_taken(row.table, len(row.request.token_ids), num_matched)
        num_blocks += self._searches.num_blocks_behind(row, self._blocks.block_size)
        return Want(row, self._searches.num_wanted(row), num_blocks)

    def rows_changed(self) -> None:
        """A row runs that did not, or no longer runs."""
        self._holdings = None

    def begin(self, wants: Iterable[Want], preempt: Callable[[Row], None]) -> None:
        """Preempt, for the first waiting row of each tenant, what others hold beyond their shares: no more than it lacks, none in vain."""
        self._holdings = None
        self._wants, self._promised = sorted(wants, key=lambda want: want.tenant in self._held()), []  # those first who hold nothing
        num_rows = num_blocks = 0  # promised
        for want in self._wants:
            if self._is_exceeded(self._held().get(want.tenant), want):
                continue
            lacks = {
                "num_rows": num_rows + want.num_rows - self.num_free_rows,
                "num_blocks": num_blocks + want.num_blocks + len(self._running) - self._blocks.num_available,
            }
            rows = self._rows_for(want, **lacks)
            if rows is not None:
                for row in rows:
                    preempt(row)
                self._promised.append(want)
                num_rows, num_blocks = num_rows + want.num_rows, num_blocks + want.num_blocks

    def end(self) -> None:
        """Keeps no rows, whose requests may end before the next step."""
        self._wants, self._promised = (), []

    def gives_way(self, row: Row) -> bool:
        """Whether a waiting row lets others pass: beyond its tenant's share all of them, before it whoever holds nothing yet."""
        holding = self._held().get(row.tenant) if row.tenant else None
        if holding is None:
            return False
        want = self.want(row, 0)
        if self._is_exceeded_by_beams(holding, want):
            return True
        if any(_is_another(other, row) for other in self._wants) and self._is_exceeded(holding, want):
            return True
        firsts = [other for other in self._promised if _is_another(other, row) and other.tenant not in self._held()]
        num_rows = self.num_free_rows - sum(other.num_rows for other in firsts)
        num_blocks = self._blocks.num_available - (len(self._running) + 1) - sum(other.num_blocks for other in firsts)
        return bool(firsts) and (num_rows < want.num_rows or num_blocks < want.num_blocks)

    def _held(self) -> dict[str, _Holding]:
        """By tenant."""
        if self._holdings is None:
            self._holdings = {}
            for row in self._running:
                holding = self._holdings.setdefault(row.tenant, _Holding())
                holding.num_rows += 1
                holding.num_beams += row.is_beam
                holding.num_blocks += len(row.table.block_ids)
            for tenant, num_rows in self._searches.reserved():
                holding = self._holdings.setdefault(tenant, _Holding())
                holding.num_rows += num_rows
                holding.num_beams += num_rows
        return self._holdings

    def _is_exceeded(self, holding: _Holding | None, want: Want) -> bool:
        """Whether the tenant would hold more than its share with it. Its only request never is too much."""
        if not want.tenant or holding is None:
            return False
        return holding.num_rows + want.num_rows > self._max_rows or holding.num_blocks + want.num_blocks > self._max_blocks

    def _is_exceeded_by_beams(self, holding: _Holding | None, want: Want) -> bool:
        """Whether the tenant would hold more than its share in rows that never make way."""
        if not want.tenant or want.num_rows == 1 or holding is None or holding.num_beams == 0:
            return False
        return holding.num_beams + want.num_rows > self._max_rows

    def _rows_for(self, want: Want, *, num_rows: int, num_blocks: int) -> list[Row] | None:
        """Who makes way so that there are so many more rows and blocks; None where it would be in vain."""
        left = {tenant: replace(holding) for tenant, holding in self._held().items()}
        given: list[Row] = []
        while num_rows > 0 or num_blocks > 0:
            row = self._next(want, [row for row in self._running if row not in given], left, has_rows=num_rows <= 0)
            if row is None:
                return None
            given.append(row)
            left[row.tenant].num_rows -= 1
            left[row.tenant].num_blocks -= len(row.table.block_ids)
            num_rows -= 1
            num_blocks -= self._blocks.num_owned(row.table) + 1  # the one that is left over for each running row
        return given

    def _next(self, want: Want, running: Sequence[Row], holdings: Mapping[str, _Holding], *, has_rows: bool) -> Row | None:
        """The youngest row of the tenant that holds most of what is lacking."""

        def held(row: Row) -> int:
            return holdings[row.tenant].num_blocks if has_rows else holdings[row.tenant].num_rows

        takes_any = want.num_rows == 1 and want.tenant not in holdings
        limit = 0 if takes_any else self._max_blocks if has_rows else self._max_rows
        may_give = [
            row
            for row in running
            if row.tenant not in ("", want.tenant) and not row.is_beam and holdings[row.tenant].num_rows > 1 and held(row) > limit
        ]
        return max(reversed(may_give), key=lambda row: (held(row), row.order), default=None)


def youngest_of_most_blocks(running: Sequence[Row]) -> Row:
    """Who is preempted where blocks are short: of the tenant that holds most of them.

    Never the oldest row of all nor another of its search, while there are others: so it gets on.
    """
    others = [row for row in running if row.order != running[0].order]
    num_blocks: dict[str, int] = {}
    for row in running:
        num_blocks[row.tenant] = num_blocks.get(row.tenant, 0) + len(row.table.block_ids)
    return max(reversed(others or running), key=lambda row: (num_blocks[row.tenant], row.order))


def _is_another(want: Want, row: Row) -> bool:
    """Whether another tenant's row still waits."""
    return want.tenant != row.tenant and want.row.request.status is RequestStatus.WAITING


def _share(whole: int) -> int:
    return max(1, whole - whole // 4)
