"""Which tokens' log probabilities belong to a piece of text, where the text is given in pieces and markers between them are left out."""

from collections.abc import Sequence
from typing import Any

Entry = dict[str, Any]  # of a token: its text's `bytes`, and what is known of it


class TokenTexts:
    """Tokens in their order, each until its text, or text behind it, is taken."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._rest = b""  # of the last token that was taken: its text behind the piece that it was taken with

    def add(self, entries: Sequence[Entry]) -> None:
        self._entries += entries

    def take(self, text: str) -> list[Entry]:
        """The tokens of `text`; those before it are dropped, as they were markers or blanks. All that wait where none has the text."""
        wanted = self._behind_rest(text.encode("utf-8", "surrogatepass"))
        if not wanted:
            return []
        starts = self._starts()
        begin = self._find(wanted, starts)
        if begin is None:
            taken, self._entries = self._entries, []
            return taken
        end = begin + len(wanted)
        first = max(index for index, start in enumerate(starts[:-1]) if start <= begin)
        after = next(index for index, start in enumerate(starts) if start >= end)
        taken, self._entries = self._entries[first:after], self._entries[after:]
        self._rest = bytes(taken[-1]["bytes"])[len(taken[-1]["bytes"]) - (starts[after] - end) :]
        return taken

    def _behind_rest(self, wanted: bytes) -> bytes:
        """What is wanted of tokens that were not taken yet."""
        num_known = len(self._rest) if wanted.startswith(self._rest) else len(wanted) if self._rest.startswith(wanted) else 0
        self._rest = self._rest[num_known:] if num_known else b""
        return wanted[num_known:]

    def _starts(self) -> list[int]:
        """Where each token begins, and where the last one ends."""
        starts = [0]
        for entry in self._entries:
            starts.append(starts[-1] + len(entry["bytes"]))
        return starts

    def _find(self, wanted: bytes, starts: list[int]) -> int | None:
        """Where the text begins: at a token's beginning if it can be, so that a letter is not found inside a marker."""
        data = b"".join(bytes(entry["bytes"]) for entry in self._entries)
        for start in starts:
            if data.startswith(wanted, start):
                return start
        place = data.find(wanted)
        return place if place >= 0 else None
