"""How many rows of the batch each beam search has and may have. Those that it may yet fork are kept free from its first step on.

Knows nothing of scores: `engine.beams` chooses who is forked and who is dropped.
"""

from dataclasses import dataclass

from engine.row import Row


@dataclass(slots=True)
class _Search:
    num_beams: int
    tenant: str
    num_rows: int = 1
    has_started: bool = False


class Searches:
    """By the request they belong to."""

    def __init__(self) -> None:
        self._searches: dict[str, _Search] = {}

    def begin(self, request_id: str, num_beams: int, tenant: str) -> None:
        self._searches[request_id] = _Search(num_beams, tenant)

    def end(self, request_id: str) -> None:
        del self._searches[request_id]

    def add_rows(self, request_id: str, num_rows: int) -> None:
        """num_rows: negative where some end."""
        self._searches[request_id].num_rows += num_rows

    def row_started(self, row: Row) -> None:
        if search := self._searches.get(row.request.request_id):
            search.has_started = True

    def row_preempted(self, row: Row) -> None:
        """A search whose only row waits again keeps nothing free."""
        search = self._searches.get(row.request.request_id)
        if search is not None and search.num_rows == 1:
            search.has_started = False

    def num_wanted(self, row: Row) -> int:
        """Rows of the batch that a waiting row takes when it starts: all of its search's."""
        search = self._searches.get(row.request.request_id)
        return 1 if search is None or search.has_started else 1 + search.num_beams - search.num_rows

    def reserved(self) -> list[tuple[str, int]]:
        """Tenants, and how many more rows their searches may fork."""
        return [(search.tenant, search.num_beams - search.num_rows) for search in self._searches.values() if search.has_started]
