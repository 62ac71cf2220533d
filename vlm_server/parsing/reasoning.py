"""The reasoning in an answer, told from what the answer is. Line ends next to the markers belong to the format and are dropped.

An answer begins in its reasoning where the prompt ends with the opening marker; elsewhere it has reasoning only if it begins with that
marker. Text without the closing marker is reasoning to its end.
"""

from dataclasses import dataclass

from vlm_server.parsing.events import Content, Event, Reasoning, merged
from vlm_server.parsing.scanner import Reading, Scanner, Steps


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model marks its reasoning."""

    opening: str
    closing: str

    def is_open_after(self, text: str) -> bool:
        """Whether an answer that follows `text` begins in its reasoning."""
        return text.rfind(self.opening) > text.rfind(self.closing)


class ReasoningReader(Scanner):
    """The events of a growing text: reasoning, then content."""

    def __init__(self, format: ReasoningFormat, *, is_open: bool) -> None:
        super().__init__()
        self._format = format
        self._events: list[Event] = []
        self.begin: int | None = 0 if is_open else None  # characters of the answer before the reasoning
        self.end: int | None = None  # characters before the closing marker
        self._reading = Reading(self, self._read())

    def feed(self, text: str) -> list[Event]:
        self._reading.feed(text)
        return self._given()

    def finish(self) -> list[Event]:
        self._reading.finish()
        return self._given()

    def _read(self) -> Steps[None]:
        if self.begin is None:
            yield from self._opening()
        if self.begin is not None:
            yield from self._reasoning()
        while (yield from self.peek()):
            place = self.num_taken
            self._events.append(Content(self.take_fed(), place))

    def _opening(self) -> Steps[None]:
        num_blank = 0
        while (yield from self.peek(num_blank)).isspace():
            num_blank += 1
        blank = self.take(num_blank)
        if (yield from self.sees(self._format.opening)):
            self.take(len(self._format.opening))
            self.begin = self.num_taken
        elif blank:
            self._events.append(Content(blank, 0))

    def _reasoning(self) -> Steps[None]:
        yield from self._skip_line_ends()
        line_ends = ""
        while not (yield from self.sees(self._format.closing)):
            char = yield from self.peek()
            if not char:
                return
            if self.take() == "\n":
                line_ends += "\n"
                continue
            self._events.append(Reasoning(line_ends + char))
            line_ends = ""
        self.end = self.num_taken
        self.take(len(self._format.closing))
        yield from self._skip_line_ends()

    def _skip_line_ends(self) -> Steps[None]:
        while (yield from self.peek()) == "\n":
            self.take()

    def _given(self) -> list[Event]:
        events, self._events = merged(self._events), []
        return events


_THINK = ReasoningFormat("<think>", "</think>")
REASONING_FORMATS = {"think": _THINK, "mistral": ReasoningFormat("[THINK]", "[/THINK]")}
REASONING_ALIASES = dict.fromkeys(
    ("default", "deepseek-r1", "deepseek-v3", "deepseek-v31", "qwen3", "qwen-qwq", "intern-s1", "internlm-s1"), "think"
)


def reasoning_format_of(template: str) -> str | None:
    """The name of the format whose markers a chat template writes, or takes out of earlier turns."""
    return next((name for name, format in REASONING_FORMATS.items() if format.opening in template or format.closing in template), None)
