"""Which tokens' log probabilities belong to a piece of text, by the places of both in the answer."""

from collections import deque
from collections.abc import Sequence
from typing import Any

Entry = dict[str, Any]  # of a token: its text's `bytes`, and what is known of it


class TokenTexts:
    """Tokens in their order, each until its text, or text behind it, is taken. Places are in characters of the answer."""

    def __init__(self) -> None:
        self._entries: deque[tuple[int, Entry]] = deque()  # each with the place where it begins

    def add(self, entries: Sequence[Entry], starts: Sequence[int]) -> None:
        self._entries.extend(zip(starts, entries, strict=True))

    def take(self, begin: int, end: int) -> list[Entry]:
        """The tokens of the text from `begin` to before `end`; those before it are dropped, as they were markers or blanks.

        A token that reaches into the text belongs to it, unless it was taken already; so do tokens without text within it.
        """
        first = self._first_start(begin)
        while self._entries and self._entries[0][0] < first:
            self._entries.popleft()
        taken: list[Entry] = []
        while self._entries and self._entries[0][0] < end:
            taken.append(self._entries.popleft()[1])
        return taken

    def _first_start(self, begin: int) -> int:
        """Where the first token begins that has text behind `begin`."""
        first = begin
        for start, entry in self._entries:
            if start > begin:
                break
            num_characters = len(bytes(entry["bytes"]).decode("utf-8", "replace"))
            first = start if start + num_characters > begin else begin
        return first
