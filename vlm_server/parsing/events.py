"""What an answer's text turns out to be, in order: content, reasoning, and calls of functions with their arguments' JSON text."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Content:
    text: str
    place: int | None = field(default=None, compare=False)  # characters of the answer before it; None where nobody asks


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentPiece:
    """A part of the JSON text of the arguments, as the model wrote it."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    is_complete: bool  # the arguments are a whole object


Event = Content | Reasoning | CallBegun | ArgumentPiece | CallEnded


def merged(events: Iterable[Event]) -> list[Event]:
    """The same events, neighbouring texts of one kind put together; content only where nothing was left out in between."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, Content) and isinstance(last, Content) and _continues(event, last):
            result[-1] = Content(last.text + event.text, last.place)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            result[-1] = Reasoning(last.text + event.text)
        elif isinstance(event, ArgumentPiece) and isinstance(last, ArgumentPiece):
            result[-1] = ArgumentPiece(last.text + event.text)
        else:
            result.append(event)
    return result


def _continues(event: Content, last: Content) -> bool:
    return event.place is None or last.place is None or event.place == last.place + len(last.text)
