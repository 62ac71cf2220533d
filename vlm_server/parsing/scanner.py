"""Reads a growing text one character at a time, by code that is written as if the whole text were there.

A reader is a generator that looks ahead as far as it needs and waits inside `peek` while the text is not there yet. What it decides
depends on the characters alone and never on where the text was cut. Knows nothing of formats.
"""

from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")
Steps = Generator[None, str, Result]


class Scanner:
    """The text that is fed and not yet taken."""

    def __init__(self) -> None:
        self._text = ""
        self._place = 0
        self._is_ended = False
        self.num_taken = 0

    def peek(self, ahead: int = 0) -> Steps[str]:
        """The character `ahead` of the place, not taken; empty behind the end of the text."""
        while self._place + ahead >= len(self._text) and not self._is_ended:
            more = yield
            self._text = self._text[self._place :] + more
            self._place = 0
        return self._text[self._place + ahead : self._place + ahead + 1]

    def sees(self, *markers: str) -> Steps[str]:
        """Which of the markers comes next, not taken; empty if none does. None of them begins with another."""
        seen = ""
        while seen not in markers:
            char = yield from self.peek(len(seen))
            seen += char
            if not char or not any(marker.startswith(seen) for marker in markers):
                return ""
        return seen

    def take(self, length: int = 1) -> str:
        """The next characters, which were peeked at."""
        text = self._text[self._place : self._place + length]
        self._place += length
        self.num_taken += length
        return text

    def take_fed(self) -> str:
        """All that was fed."""
        return self.take(len(self._text) - self._place)

    def is_cut_short(self, *markers: str) -> bool:
        """Whether the text ended in the middle of one of the markers."""
        rest = self._text[self._place :]
        return self._is_ended and rest != "" and any(marker.startswith(rest) for marker in markers)

    def end_text(self) -> None:
        self._is_ended = True


class Reading:
    """Runs one reader over the text that it is fed."""

    def __init__(self, scanner: Scanner, steps: Steps[None]) -> None:
        self._scanner = scanner
        self._steps = steps
        next(steps, None)

    def feed(self, text: str) -> None:
        self._send(text)

    def finish(self) -> None:
        """The text ends here."""
        self._scanner.end_text()
        self._send("")

    def _send(self, text: str) -> None:
        try:
            self._steps.send(text)
        except StopIteration:
            assert not text, "a reader reads to the end"
