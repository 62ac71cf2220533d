"""Which rows each beam search has. It runs and waits as a whole, so that none stands still with blocks that others wait for.

While it waits, its first row stands for it, and the others are set aside: neither waiting nor running. They go on as forks of the first one
as soon as that is computed, on what they have in common with it, so that a search which was preempted needs no more blocks than one which
was not. While it runs, the rows of the batch that it may yet fork are kept free.
Knows nothing of scores: `engine.beams` chooses who is forked and who is dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.request import RequestStatus
from engine.row import Row


@dataclass(slots=True)
class _Search:
    num_beams: int
    rows: list[Row]  # never empty, but while it ends

    @property
    def num_running(self) -> int:
        return sum(row.request.status is RequestStatus.RUNNING for row in self.rows)


class Searches:
    """By the request they belong to, which their rows name."""

    def __init__(self) -> None:
        self._searches: dict[str, _Search] = {}

    def __contains__(self, request_id: str) -> bool:
        """Whether a request's search goes on, also where its own row was dropped."""
        return request_id in self._searches

    def begin(self, row: Row, num_beams: int) -> None:
        """A request's own row, which waits."""
        row.search_id = row.request.request_id
        self._searches[row.search_id] = _Search(num_beams, [row])

    def end(self, request_id: str) -> None:
        del self._searches[request_id]

    def add_row(self, request_id: str, row: Row) -> None:
        row.search_id = request_id
        self._searches[request_id].rows.append(row)

    def remove_row(self, row: Row) -> None:
        if search := self._of(row):
            search.rows.remove(row)

    def rows_with(self, row: Row) -> Sequence[Row]:
        """All rows of its search, the one first that stands for it; of an ordinary row, the row."""
        search = self._of(row)
        return [row] if search is None else list(search.rows)

    def set_aside(self) -> list[Row]:
        """Rows that neither wait nor run."""
        return [row for search in self._searches.values() for row in _behind(search)]

    def behind(self, row: Row) -> list[Row]:
        """The rows that were set aside and go on when this one is computed."""
        search = self._of(row)
        return [] if search is None or search.rows[0] is not row else _behind(search)

    def num_blocks_behind(self, row: Row, block_size: int) -> int:
        """Blocks that those rows will take."""
        return sum(-(-len(each.request.token_ids) // block_size) - num_common(row, each) // block_size for each in self.behind(row))

    def num_wanted(self, row: Row) -> int:
        """Rows of the batch that a waiting row takes when it starts: all of its search's."""
        search = self._of(row)
        return 1 if search is None else search.num_beams

    def reserved(self) -> list[tuple[str, int]]:
        """Tenants, and how many more rows their running searches may have."""
        running = [(search, num_rows) for search in self._searches.values() if (num_rows := search.num_running)]
        return [(search.rows[0].tenant, search.num_beams - num_rows) for search, num_rows in running]

    def _of(self, row: Row) -> _Search | None:
        return None if row.search_id is None else self._searches[row.search_id]


def num_common(first: Row, other: Row) -> int:
    """Leading slots that two rows of a search have in common: the prompt, and the output until they differ, as they always do."""
    pairs = zip(first.request.output_token_ids, other.request.output_token_ids, strict=True)
    return first.request.num_prompt_tokens + next(index for index, (mine, its) in enumerate(pairs) if mine != its)


def _behind(search: _Search) -> list[Row]:
    return [row for row in search.rows[1:] if row.request.status is RequestStatus.WAITING]
