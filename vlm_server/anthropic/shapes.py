"""How a message of Anthropic's API looks on the wire, whole and as events.

An answer is a row of blocks: texts, thoughts and calls, in the model's order. The input of a call is a JSON object, always: it is sent when
the call has ended, in one piece, unless its tool asks for `eager_input_streaming`.
"""

import json
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from engine.request import FinishReason
from vlm_server.anthropic.protocol import MessagesRequest
from vlm_server.errors import ApiError
from vlm_server.generation import TOOL_CALLS, Delta, FinishedAnswer, Usage
from vlm_server.nesting import is_too_deep
from vlm_server.parsing.events import ArgumentPiece, CallBegun, CallEnded, Content, Event, Reasoning
from vlm_server.stage_timings import Report, no_report
from vlm_server.streaming import EventStyle

SIGNATURE = "unsigned"  # of thoughts: nobody checks it when they come back
INVALID_JSON = "INVALID_JSON"  # Anthropic's own word for what a model wrote in place of an object

Chunk = dict[str, Any]


class MessageShape:
    """`message`, and the events from `message_start` to `message_stop`, of the one answer to a request."""

    events = EventStyle(is_named=True, closing=b"")

    def __init__(
        self,
        request: MessagesRequest,
        *,
        response_id: str,
        request_id: str,
        warnings: Sequence[str],
        extras: Mapping[str, Any] | None = None,
        report: Report = no_report,
    ) -> None:
        """extras: what else stands beside the usage of the whole answer. report: the request's timings, where they are asked for."""
        self._report = report
        self._request = request
        self._request_id = request_id
        self._head = {"id": response_id, "type": "message", "role": "assistant", "model": request.model}
        self._warnings = {"warnings": list(warnings)} if warnings else {}
        self._extras = dict(extras or {})
        hides_thoughts = request.thinking is not None and request.thinking.display == "omitted"
        eager = {tool.name for tool in request.tools or () if tool.eager_input_streaming}
        self._blocks = BlockWriter(eager=eager, hides_thoughts=hides_thoughts)
        self._ending: tuple[str | None, str | None] = None, None  # the finish reason and the stop string

    def first_chunks(self, num_answers: int, usage: Usage) -> list[Chunk]:
        message = {**self._head, "content": [], **_stop(None), "usage": _usage(usage, tier=True), **self._warnings}
        return [{"type": "message_start", "message": message}]

    def chunks(self, delta: Delta) -> list[Chunk]:
        chunks = [chunk for event in delta.events for chunk in self._blocks.take(event)]
        if delta.finish_reason is not None:
            self._ending = delta.finish_reason, delta.stop_string
            chunks += self._blocks.close()
        return chunks

    def last_chunks(self, usage: Usage) -> list[Chunk]:
        delta = self._stop_fields(*self._ending, usage)
        last = {"usage": _usage(usage), **self._extras, **self._report()}
        return [{"type": "message_delta", "delta": delta, **last}, {"type": "message_stop"}]

    def error_chunk(self, error: ApiError, usage: Usage) -> Chunk:
        return error.anthropic_body(self._request_id)

    def response(self, answers: list[FinishedAnswer], usage: Usage) -> dict[str, Any]:
        """What a client makes of the stream."""
        [answer] = answers
        content = [block.as_dict() for block in self._whole_blocks(answer.events)]
        stop = self._stop_fields(answer.finish_reason, answer.stop_string, usage)
        extras = {**self._warnings, **self._extras, **self._report()}
        return {**self._head, "content": content, **stop, "usage": _usage(usage, tier=True), **extras}

    def _whole_blocks(self, events: Sequence[Event]) -> "list[_Block]":
        blocks: list[_Block] = []
        for chunk in [*(chunk for event in events for chunk in self._blocks.take(event)), *self._blocks.close()]:
            if chunk["type"] == "content_block_start":
                blocks.append(_Block(chunk["content_block"]))
            elif chunk["type"] == "content_block_delta":
                blocks[-1].add(chunk["delta"])
        return blocks

    def _stop_fields(self, finish_reason: str | None, stop_string: str | None, usage: Usage) -> dict[str, Any]:
        if finish_reason == TOOL_CALLS:
            return _stop("tool_use")
        if finish_reason == FinishReason.LENGTH:
            return _stop("max_tokens" if usage.completion_tokens >= self._request.max_tokens else "model_context_window_exceeded")
        if finish_reason == FinishReason.ABORT:  # the API has no word for it; this one says that the answer is cut, and asks for no retry
            return _stop("max_tokens")
        is_own = stop_string in (self._request.stop_sequences or ())  # others are the chat template's
        return _stop("stop_sequence", stop_string) if is_own else _stop("end_turn")


def _stop(reason: str | None, sequence: str | None = None) -> dict[str, Any]:
    return {"stop_reason": reason, "stop_sequence": sequence, "stop_details": None}


def _usage(usage: Usage, *, tier: bool = False) -> dict[str, Any]:
    """Tokens from the prefix cache are not in `input_tokens`; nothing is charged for filling it."""
    thinking = None if usage.reasoning_tokens is None else {"thinking_tokens": usage.reasoning_tokens}
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": thinking,
        **({"service_tier": "standard"} if tier else {}),
    }


class BlockWriter:
    """The events of blocks, one open at a time.

    eager: tools whose input is sent as it is written. hides_thoughts: their blocks come without text.
    """

    def __init__(self, *, eager: set[str], hides_thoughts: bool) -> None:
        self._eager = eager
        self._hides_thoughts = hides_thoughts
        self._index = -1  # of the block that was opened last
        self._open: str | None = None  # its type, until it is closed
        self._is_eager = False
        self._input: list[str] = []  # of the open call, where it is not sent at once

    def take(self, event: Event) -> Iterator[Chunk]:
        match event:
            case Content(text):
                yield from self._within("text", {"text": ""})
                yield self._delta("text_delta", text=text)
            case Reasoning(text):
                yield from self._within("thinking", {"thinking": "", "signature": ""})
                if not self._hides_thoughts:
                    yield self._delta("thinking_delta", thinking=text)
            case CallBegun(name):
                yield from self.close()
                yield self._start("tool_use", {"id": f"toolu_{uuid.uuid4().hex[:24]}", "name": name, "input": {}})
                self._is_eager, self._input = name in self._eager, []
            case ArgumentPiece(text) if self._is_eager:
                yield self._delta("input_json_delta", partial_json=text)
            case ArgumentPiece(text):
                self._input.append(text)
            case CallEnded():
                yield from self.close()

    def close(self) -> Iterator[Chunk]:
        """The end of the open block, if there is one."""
        if self._open is None:
            return
        if self._open == "thinking":
            yield self._delta("signature_delta", signature=SIGNATURE)
        if self._open == "tool_use" and not self._is_eager:
            yield self._delta("input_json_delta", partial_json=input_json("".join(self._input)))
        self._open = None
        yield {"type": "content_block_stop", "index": self._index}

    def _within(self, kind: str, empty: dict[str, Any]) -> Iterator[Chunk]:
        if self._open != kind:
            yield from self.close()
            yield self._start(kind, empty)

    def _start(self, kind: str, empty: dict[str, Any]) -> Chunk:
        self._open = kind
        self._index += 1
        return {"type": "content_block_start", "index": self._index, "content_block": {"type": kind, **empty}}

    def _delta(self, kind: str, **value: str) -> Chunk:
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, **value}}


@dataclass(slots=True)
class _Block:
    """A block of a whole answer, put together from its events."""

    fields: dict[str, Any]
    pieces: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # by the field that they are of

    def add(self, delta: dict[str, str]) -> None:
        for name in ("text", "thinking", "signature", "partial_json"):
            if name in delta:
                self.pieces[name].append(delta[name])

    def as_dict(self) -> dict[str, Any]:
        texts = {name: "".join(pieces) for name, pieces in self.pieces.items()}
        if self.fields["type"] == "tool_use":
            return {**self.fields, "input": msgspec.Raw(input_json(texts.get("partial_json", "")).encode())}
        return {**self.fields, **texts}


def input_json(text: str) -> str:
    """The object that a model wrote as a call's arguments, as JSON without characters beyond ASCII.

    Where it wrote none, because it was cut short or is no JSON: an object that holds its text under INVALID_JSON. A client that runs
    its tools without a look at `stop_reason` then gets an error of the tool, and never half of the input.
    """
    try:
        value = json.loads(text, strict=False, parse_constant=_refuse)
        if isinstance(value, dict) and not is_too_deep(value):
            return json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        pass
    return json.dumps({INVALID_JSON: text})


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")
