"""An answer's text as output items, and as the events of a stream that builds them up.

The same writer makes both, so that a stream ends in what a whole response has. Knows nothing of HTTP, of tokens as numbers or of requests.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_server.parsing.events import ArgumentPiece, CallBegun, CallEnded, Content, Event, Reasoning
from vlm_server.responses.items import new_item_id, text_part
from vlm_server.responses.token_texts import TokenTexts

Chunk = dict[str, Any]
NewId = Callable[[str], str]


@dataclass(slots=True)
class _OpenItem:
    """The item that is being written: the last one. Knows the words that events have for its kind."""

    item: dict[str, Any]
    index: int
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    end: int = 0  # characters of the answer up to the end of its text, where it is a message

    @property
    def kind(self) -> str:
        return str(self.item["type"])

    @property
    def place(self) -> dict[str, Any]:
        return {"item_id": self.item["id"], "output_index": self.index}

    def part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return text_part(text, logprobs) if self.kind == "message" else {"type": "reasoning_text", "text": text}

    def begun(self) -> list[Chunk]:
        chunks = [{"type": "response.output_item.added", "output_index": self.index, "item": dict(self.item)}]
        if self.kind == "function_call":
            return chunks
        return [*chunks, {"type": "response.content_part.added", **self.place, "content_index": 0, "part": self.part("", [])}]

    def added(self, text: str, logprobs: list[dict[str, Any]]) -> Chunk:
        self.texts.append(text)
        self.logprobs += logprobs
        match self.kind:
            case "message":
                return {"type": "response.output_text.delta", **self.place, "content_index": 0, "delta": text, "logprobs": logprobs}
            case "reasoning":
                return {"type": "response.reasoning_text.delta", **self.place, "content_index": 0, "delta": text}
            case _:
                return {"type": "response.function_call_arguments.delta", **self.place, "delta": text}

    def ended(self, status: str) -> list[Chunk]:
        """The item has all of its text from here on."""
        text = "".join(self.texts)
        self.item["status"] = status
        done = {"type": "response.output_item.done", "output_index": self.index, "item": self.item}
        if self.kind == "function_call":
            self.item["arguments"] = text
            named = {**self.place, "name": self.item["name"], "arguments": text}
            return [{"type": "response.function_call_arguments.done", **named}, done]
        part = self.part(text, self.logprobs)
        self.item["content"] = [part]
        whole = {**self.place, "content_index": 0}
        if self.kind == "message":
            text_done = {"type": "response.output_text.done", **whole, "text": text, "logprobs": self.logprobs}
        else:
            text_done = {"type": "response.reasoning_text.done", **whole, "text": text}
        return [text_done, {"type": "response.content_part.done", **whole, "part": part}, done]


class OutputWriter:
    """Items and chunks of one answer; the chunks have no sequence numbers yet."""

    def __init__(self, *, new_id: NewId = new_item_id) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: _OpenItem | None = None
        self._new_id = new_id
        self._tokens = TokenTexts()

    @property
    def text(self) -> str:
        """Of all messages."""
        return "".join(part["text"] for item in self.items if item["type"] == "message" for part in item["content"])

    def write(self, events: Sequence[Event], logprobs: Sequence[dict[str, Any]] = (), offsets: Sequence[int] = ()) -> list[Chunk]:
        """logprobs: of the tokens whose text is in the events or before them, or is still held back. offsets: see `Delta`."""
        self._tokens.add(logprobs, offsets)
        return [chunk for event in events for chunk in self._write(event)]

    def finish(self, *, is_cut: bool) -> list[Chunk]:
        """The end of the answer; one without any item has a message without text. is_cut: its last item is not complete."""
        chunks = [] if self.items else self._begin("message", role="assistant", content=[])
        return chunks + self._end("incomplete" if is_cut else "completed")

    def _write(self, event: Event) -> list[Chunk]:
        match event:
            case Content(text, place):
                return self._add_content(text, place or 0)
            case Reasoning(text):
                return [*self._begin_unless_open("reasoning", summary=[], content=[]), self._added(text)]
            case CallBegun(name):
                return self._begin("function_call", call_id=self._new_id("call"), name=name, arguments="")
            case ArgumentPiece(text):
                return [self._added(text)]
            case CallEnded(is_complete):
                return self._end("completed" if is_complete else "incomplete")

    def _add_content(self, text: str, place: int) -> list[Chunk]:
        chunks = self._begin_unless_open("message", role="assistant", content=[])
        assert self._open is not None
        self._open.end = place + len(text)
        return [*chunks, self._added(text, self._tokens.take(place, self._open.end))]

    def _added(self, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> Chunk:
        assert self._open is not None, "text without an item"
        return self._open.added(text, list(logprobs))

    def _begin_unless_open(self, kind: str, **fields: Any) -> list[Chunk]:
        return [] if self._open is not None and self._open.kind == kind else self._begin(kind, **fields)

    def _begin(self, kind: str, **fields: Any) -> list[Chunk]:
        chunks = self._end("completed")
        item = {"id": self._new_id(kind), "type": kind, "status": "in_progress", **fields}
        self._open = _OpenItem(item, len(self.items))
        self.items.append(item)
        return chunks + self._open.begun()

    def _end(self, status: str) -> list[Chunk]:
        ended, self._open = self._open, None
        if ended is not None and ended.kind == "message":  # a token that may have held a stop string's beginning came after its text
            ended.logprobs += self._tokens.take(0, ended.end)
        return ended.ended(status) if ended is not None else []
