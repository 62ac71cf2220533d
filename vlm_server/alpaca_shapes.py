"""How `--compat alpaca` writes its answers: whole in Chinese-LLaMA-Alpaca's shapes, key by key; streams, which that has not, in OpenAI's.

An answer's choice has the same index in both: in a chat it comes behind the messages, which whole answers repeat and streams do not.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from vlm_server.alpaca import StrippedStream, Turn, answer_text
from vlm_server.errors import ApiError
from vlm_server.generation import Delta, FinishedAnswer, Usage
from vlm_server.shapes import usage_chunks
from vlm_server.stage_timings import Report
from vlm_server.streaming import OPENAI_EVENTS


class AlpacaChatShape:
    """`chat.completion`: the messages, then the answers."""

    events = OPENAI_EVENTS

    def __init__(
        self, turns: Sequence[Turn], *, model: str, response_id: str, includes_usage: bool, warnings: Sequence[str], report: Report
    ) -> None:
        self._report = report
        self._turns = turns
        self._head = {"id": response_id, "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
        self._includes_usage = includes_usage
        self._warnings = {"warnings": list(warnings)} if warnings else {}
        self._strips: defaultdict[int, StrippedStream] = defaultdict(StrippedStream)

    def first_chunks(self, num_answers: int, usage: Usage) -> list[dict[str, Any]]:
        """The role alone, per answer, as OpenAI."""
        return [self._chunk(index, {"role": "assistant", "content": ""}, None) for index in range(num_answers)]

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        text = self._strips[delta.index].feed(delta.text)
        if not (text or delta.finish_reason):
            return []
        chunk = self._chunk(delta.index, {"content": text}, delta.finish_reason)
        return [chunk | self._warnings if delta.finish_reason else chunk]

    def last_chunks(self, usage: Usage) -> list[dict[str, Any]]:
        return usage_chunks({**self._head, **self._warnings}, usage if self._includes_usage else None, self._report())

    def error_chunk(self, error: ApiError, usage: Usage) -> dict[str, Any]:
        return error.body()

    def response(self, answers: list[FinishedAnswer], usage: Usage) -> dict[str, Any]:
        said = [*self._turns, *(Turn("assistant", answer_text(answer.text)) for answer in answers)]
        choices = [{"index": index, "message": {"role": turn.role, "content": turn.text}} for index, turn in enumerate(said)]
        return {**self._head, "object": "chat.completion", "choices": choices, **self._warnings, **self._report()}

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": len(self._turns) + index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "choices": [choice], "usage": None}


class AlpacaCompletionShape:
    """`text_completion`."""

    events = OPENAI_EVENTS

    def __init__(self, *, model: str, response_id: str, includes_usage: bool, warnings: Sequence[str], report: Report) -> None:
        self._report = report
        self._head = {"id": response_id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._includes_usage = includes_usage
        self._warnings = {"warnings": list(warnings)} if warnings else {}
        self._strips: defaultdict[int, StrippedStream] = defaultdict(StrippedStream)

    def first_chunks(self, num_answers: int, usage: Usage) -> list[dict[str, Any]]:
        return []

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        text = self._strips[delta.index].feed(delta.text)
        if not (text or delta.finish_reason):
            return []
        choice = {"index": delta.index, "text": text, "logprobs": None, "finish_reason": delta.finish_reason}
        chunk = {**self._head, "choices": [choice], "usage": None}
        return [chunk | self._warnings if delta.finish_reason else chunk]

    def last_chunks(self, usage: Usage) -> list[dict[str, Any]]:
        return usage_chunks({**self._head, **self._warnings}, usage if self._includes_usage else None, self._report())

    def error_chunk(self, error: ApiError, usage: Usage) -> dict[str, Any]:
        return error.body()

    def response(self, answers: list[FinishedAnswer], usage: Usage) -> dict[str, Any]:
        choices = [{"index": index, "text": answer_text(answer.text)} for index, answer in enumerate(answers)]
        return {**self._head, "choices": choices, **self._warnings, **self._report()}
