"""What an answer's text turns out to be, in order: content, reasoning, and calls of functions with their arguments' JSON text."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    text: str


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
    """The same events, neighbouring texts of one kind put together."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, Content) and isinstance(last, Content):
            result[-1] = Content(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            result[-1] = Reasoning(last.text + event.text)
        elif isinstance(event, ArgumentPiece) and isinstance(last, ArgumentPiece):
            result[-1] = ArgumentPiece(last.text + event.text)
        else:
            result.append(event)
    return result
