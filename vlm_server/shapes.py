"""How chat and text completions look on the wire: OpenAI's objects, with every null written out as LMDeploy's clients expect."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from vlm_server.backend import Tokenizer
from vlm_server.generation import Delta, FinishedAnswer, Usage
from vlm_server.logprobs import chat_logprobs, completion_logprobs
from vlm_server.protocol import GenerationFields


class ChatShape:
    """`chat.completion` and `chat.completion.chunk`."""

    def __init__(self, request: GenerationFields, tokenizer: Tokenizer, *, response_id: str, warnings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._head = {"id": response_id, "object": "chat.completion.chunk", "created": int(time.time()), "model": request.model}
        self._warnings = {"warnings": list(warnings)} if warnings else {}

    def first_chunks(self, num_answers: int) -> list[dict[str, Any]]:
        """The role alone, per answer, as OpenAI."""
        return [self._chunk(index, {"role": "assistant", "content": ""}, None, None) for index in range(num_answers)]

    def chunk(self, delta: Delta) -> dict[str, Any]:
        logprobs = chat_logprobs(delta.logprobs, self._tokenizer) if delta.logprobs is not None else None
        chunk = self._chunk(delta.index, {"content": delta.text}, logprobs, delta.finish_reason)
        return chunk | self._warnings if delta.finish_reason else chunk

    def last_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage.as_dict(), **self._warnings}

    def response(self, answers: list[FinishedAnswer], usage: Usage) -> dict[str, Any]:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": usage.as_dict(), "service_tier": None, **self._warnings}

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: object, finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "choices": [choice], "usage": None}

    def _choice(self, index: int, answer: FinishedAnswer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None, "reasoning_content": None, "tool_calls": None}
        logprobs = chat_logprobs(answer.logprobs, self._tokenizer) if answer.logprobs is not None else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish_reason}


class CompletionShape:
    """`text_completion`, streamed or whole."""

    def __init__(self, request: GenerationFields, tokenizer: Tokenizer, *, response_id: str, warnings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._head = {"id": response_id, "object": "text_completion", "created": int(time.time()), "model": request.model}
        self._warnings = {"warnings": list(warnings)} if warnings else {}

    def first_chunks(self, num_answers: int) -> list[dict[str, Any]]:
        return []

    def chunk(self, delta: Delta) -> dict[str, Any]:
        logprobs = completion_logprobs(delta.logprobs, self._tokenizer, offset=delta.offset) if delta.logprobs is not None else None
        choice = {"index": delta.index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason}
        chunk = {**self._head, "choices": [choice], "usage": None}
        return chunk | self._warnings if delta.finish_reason else chunk

    def last_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage.as_dict(), **self._warnings}

    def response(self, answers: list[FinishedAnswer], usage: Usage) -> dict[str, Any]:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return {**self._head, "choices": choices, "usage": usage.as_dict(), **self._warnings}

    def _choice(self, index: int, answer: FinishedAnswer) -> dict[str, Any]:
        logprobs = completion_logprobs(answer.logprobs, self._tokenizer, offset=0) if answer.logprobs is not None else None
        return {"index": index, "text": answer.text, "logprobs": logprobs, "finish_reason": answer.finish_reason}


def new_id(prefix: str) -> str:
    """`chatcmpl-…`, unique."""
    return f"{prefix}-{uuid.uuid4().hex}"
