"""How chat and text completions look on the wire: OpenAI's objects, with every null written out as LMDeploy's clients expect."""

import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from engine.request import TokenLogprobs
from vlm_server.backend import Tokenizer
from vlm_server.echo import Echo
from vlm_server.errors import ApiError
from vlm_server.generation import Delta, FinishedAnswer, Usage
from vlm_server.logprobs import chat_logprobs, completion_logprobs
from vlm_server.parsing.events import ArgumentPiece, CallBegun, CallEnded, Content, Event, Reasoning
from vlm_server.protocol import CompletionRequest, GenerationFields
from vlm_server.stage_timings import Report, no_report
from vlm_server.streaming import OPENAI_EVENTS

_encode = msgspec.json.Encoder().encode


class ChatShape:
    """`chat.completion` and `chat.completion.chunk`, from the events of each answer.

    is_plain: answers are content alone, which is then never null. extras: what else stands beside the usage and at an answer's end.
    report: the request's timings, where they are asked for.
    """

    events = OPENAI_EVENTS

    def __init__(
        self,
        request: GenerationFields,
        tokenizer: Tokenizer,
        *,
        response_id: str,
        warnings: Sequence[str],
        is_plain: bool = True,
        extras: Mapping[str, Any] | None = None,
        report: Report = no_report,
    ) -> None:
        self._tokenizer = tokenizer
        self._nothing = "" if is_plain else None
        self._num_calls: Counter[int] = Counter()  # by the answer's index
        self._head = {"id": response_id, "object": "chat.completion.chunk", "created": int(time.time()), "model": request.model}
        self._warnings = {**({"warnings": list(warnings)} if warnings else {}), **(extras or {})}
        self._includes_usage = request.includes_usage
        self._report = report

    def first_chunks(self, num_answers: int, usage: Usage) -> list[dict[str, Any]]:
        """The role alone, per answer, as OpenAI."""
        return [self._chunk(index, {"role": "assistant", "content": self._nothing}, None, None) for index in range(num_answers)]

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """One per event. Log probabilities are in the first; the finish reason is in the last, alone where that would be of a call."""
        contents = [content for event in delta.events for content in self._delta(delta.index, event)]
        if not contents or (delta.finish_reason and "tool_calls" in contents[-1]):
            contents.append({"content": self._nothing})
        logprobs = chat_logprobs(delta.logprobs, self._tokenizer) if delta.logprobs is not None else None
        chunks = [self._chunk(delta.index, content, None, None) for content in contents]
        chunks[0]["choices"][0]["logprobs"] = logprobs
        chunks[-1]["choices"][0]["finish_reason"] = delta.finish_reason
        if delta.finish_reason:
            chunks[-1] |= self._warnings
        return chunks

    def last_chunks(self, usage: Usage) -> list[dict[str, Any]]:
        return usage_chunks({**self._head, **self._warnings}, usage if self._includes_usage else None, self._report())

    def error_chunk(self, error: ApiError, usage: Usage) -> dict[str, Any]:
        return error.body()

    def response(self, answers: list[FinishedAnswer], usage: Usage) -> dict[str, Any]:
        choices = [_written(self._choice(index, answer)) for index, answer in enumerate(answers)]
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": usage.as_dict(), "service_tier": None, **self._warnings, **self._report()}

    def _delta(self, index: int, event: Event) -> list[dict[str, Any]]:
        match event:
            case Content(text):
                return [{"content": text}]
            case Reasoning(text):
                return [{"content": None, "reasoning_content": text}]
            case CallBegun(name):
                self._num_calls[index] += 1
                return [{"content": None, "tool_calls": [{"index": self._num_calls[index] - 1, **_call(name, "")}]}]
            case ArgumentPiece(text):
                piece = {"index": self._num_calls[index] - 1, "function": {"arguments": text}}
                return [{"content": None, "tool_calls": [piece]}]
            case CallEnded():
                return []

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: object, finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "choices": [choice], "usage": None}

    def _choice(self, index: int, answer: FinishedAnswer) -> dict[str, Any]:
        logprobs = chat_logprobs(answer.logprobs, self._tokenizer) if answer.logprobs is not None else None
        return {"index": index, "message": _message(answer.events), "logprobs": logprobs, "finish_reason": answer.finish_reason}


def _message(events: Sequence[Event]) -> dict[str, Any]:
    """The assistant's; its content is null where there is something else and no content."""
    content = "".join(event.text for event in events if isinstance(event, Content))
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    calls: list[dict[str, Any]] = []
    for event in events:
        if isinstance(event, CallBegun):
            calls.append(_call(event.name, ""))
        elif isinstance(event, ArgumentPiece):
            calls[-1]["function"]["arguments"] += event.text
    return {
        "role": "assistant",
        "content": None if not content and (reasoning or calls) else content,
        "refusal": None,
        "reasoning_content": reasoning or None,
        "tool_calls": calls or None,
    }


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": {"name": name, "arguments": arguments}}


class CompletionShape:
    """`text_completion`, streamed or whole. echoes: the prompts that answers begin with; none without `echo`."""

    events = OPENAI_EVENTS

    def __init__(
        self,
        request: CompletionRequest,
        tokenizer: Tokenizer,
        *,
        response_id: str,
        warnings: Sequence[str],
        echoes: Sequence[Echo] = (),
        report: Report = no_report,
    ) -> None:
        self._tokenizer = tokenizer
        self._head = {"id": response_id, "object": "text_completion", "created": int(time.time()), "model": request.model}
        self._warnings = {"warnings": list(warnings)} if warnings else {}
        self._includes_usage = request.includes_usage
        self._shows_logprobs = request.logprobs is not None
        self._num_candidates, self._num_choices = request.num_candidates, request.num_choices
        self._echoes = echoes
        self._echoed: dict[
            int, tuple[dict[str, list[object]], int]
        ] = {}  # prompts' log probabilities, and how many choices still need them
        self._report = report
        self._begun: set[int] = set()  # answers that have a chunk

    def first_chunks(self, num_answers: int, usage: Usage) -> list[dict[str, Any]]:
        return []

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        choice = self._choice(delta.index, delta.index, delta, begins=delta.index not in self._begun)
        self._begun.add(delta.index)
        chunk = {**self._head, "choices": [choice], "usage": None}
        return [chunk | self._warnings if delta.finish_reason else chunk]

    def last_chunks(self, usage: Usage) -> list[dict[str, Any]]:
        return usage_chunks({**self._head, **self._warnings}, usage if self._includes_usage else None, self._report())

    def error_chunk(self, error: ApiError, usage: Usage) -> dict[str, Any]:
        return error.body()

    def response(self, answers: list[FinishedAnswer], usage: Usage) -> dict[str, Any]:
        chosen = self._chosen(answers)
        choices = [_written(self._choice(place, index, answers[index], begins=True)) for place, index in enumerate(chosen)]
        return {**self._head, "choices": choices, "usage": usage.as_dict(), **self._warnings, **self._report()}

    def _chosen(self, answers: list[FinishedAnswer]) -> list[int]:
        """The answers that are shown, in order: all, or of each prompt's candidates the best ones, the best one first."""
        if self._num_candidates == self._num_choices:
            return list(range(len(answers)))
        groups = (range(start, start + self._num_candidates) for start in range(0, len(answers), self._num_candidates))
        ranked = (sorted(group, key=lambda index: -answers[index].mean_logprob) for group in groups)
        return [index for group in ranked for index in group[: self._num_choices]]

    def _choice(self, place: int, index: int, piece: Delta | FinishedAnswer, *, begins: bool) -> dict[str, Any]:
        """Answer `index`, or a piece of it, as choice `place`. begins: with the prompt, where that is echoed."""
        echo = self._echoes[index // self._num_candidates] if self._echoes else _NO_ECHO
        logprobs = None
        if self._shows_logprobs and (piece.logprobs is not None or piece.prompt_logprobs is not None):
            offsets = [len(echo.text) + offset for offset in piece.offsets]
            logprobs = completion_logprobs(piece.logprobs or (), self._tokenizer, offsets=offsets)
        if logprobs is not None and piece.prompt_logprobs is not None:
            before = self._echoed_logprobs(index // self._num_candidates, piece.prompt_logprobs)
            logprobs = {name: before[name] + values for name, values in logprobs.items()}
        text = echo.text + piece.text if begins else piece.text
        return {"index": place, "text": text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _echoed_logprobs(self, prompt: int, scored: Sequence[TokenLogprobs]) -> dict[str, list[object]]:
        """Of a prompt's tokens, written once for all of its choices that are shown."""
        written, num_left = self._echoed.pop(prompt, (None, self._num_choices))
        if written is None:
            written = self._echoes[prompt].logprobs(scored, self._tokenizer)
        if num_left > 1:
            self._echoed[prompt] = written, num_left - 1
        return written


_NO_ECHO = Echo("", ())


def _written(choice: dict[str, Any]) -> msgspec.Raw:
    """One choice as JSON: the encoder keeps the interpreter's lock, and all of them at once may be tens of megabytes."""
    return msgspec.Raw(_encode(choice))


def usage_chunks(head: dict[str, Any], usage: Usage | None, more: dict[str, Any]) -> list[dict[str, Any]]:
    """A stream's last chunk, without choices: the usage, and what else is asked for beside it; none without either."""
    if usage is None and not more:
        return []
    return [{**head, "choices": [], "usage": None if usage is None else usage.as_dict(), **more}]


def new_id(prefix: str) -> str:
    """`chatcmpl-…`, unique."""
    return f"{prefix}-{uuid.uuid4().hex}"
