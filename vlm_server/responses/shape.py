"""How a response of `/v1/responses` looks on the wire, whole and as events. Knows nothing of how it is kept."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_server.backend import Tokenizer
from vlm_server.errors import ApiError
from vlm_server.generation import Delta, FinishedAnswer, Usage
from vlm_server.logprobs import chat_logprobs
from vlm_server.responses.field_paths import FieldPaths
from vlm_server.responses.output import Chunk, OutputWriter
from vlm_server.responses.request import CreateResponse, FunctionTool, TextFormatJsonSchema, ToolChoiceAllowed, ToolChoiceFunction
from vlm_server.sampling import SamplingDefaults
from vlm_server.stage_timings import Report, no_report
from vlm_server.streaming import EventStyle

# What a finish reason makes of the response, and its details; others complete it.
_CUTS: dict[str | None, tuple[str, dict[str, str] | None]] = {
    "length": ("incomplete", {"reason": "max_output_tokens"}),
    "abort": ("cancelled", None),
}


class ResponseShape:
    """`response`, and the events that build one up. One answer only: it is begun once, by `first_chunks` or by `response`."""

    events = EventStyle(is_named=True, closing=b"")

    def __init__(
        self,
        head: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        warnings: Sequence[str] = (),
        paths: FieldPaths,
        extras: Mapping[str, Any] | None = None,
        report: Report = no_report,
    ) -> None:
        """head: see `response_head`. extras: what else stands beside the usage. report: the timings, where they are asked for."""
        self._report = report
        self._head = head
        self._tokenizer = tokenizer
        self._warnings = {"warnings": list(warnings)} if warnings else {}
        self._extras = dict(extras or {})
        self._paths = paths
        self._writer = OutputWriter()
        self._finish_reason: str | None = None
        self._number = -1
        self._ending: list[Chunk] = []  # of the last item; the client is not told yet
        self.final: dict[str, Any] | None = None  # the response, once it is whole

    def first_chunks(self, num_answers: int, usage: Usage) -> list[Chunk]:
        begun = {**self._head, **self._warnings}
        return self._numbered([{"type": "response.created", "response": begun}, {"type": "response.in_progress", "response": begun}])

    def chunks(self, delta: Delta) -> list[Chunk]:
        self._finish_reason = delta.finish_reason
        logprobs: Any = chat_logprobs(delta.logprobs, self._tokenizer)["content"] if delta.logprobs is not None else []
        return self._numbered(self._writer.write(delta.events, logprobs, delta.offsets if logprobs else ()))

    def last_chunks(self, usage: Usage) -> list[Chunk]:
        final = self.final or self.finish(usage)
        kind = "response.incomplete" if self._is_cut else "response.completed"  # a cancelled response has no event of its own
        return self._numbered([*self._ending, {"type": kind, "response": final}])

    def error_chunk(self, error: ApiError, usage: Usage) -> Chunk:
        """The response as it is, failed. What was written so far is in it; an item whose end the client was not told of is cut."""
        named = self._paths.error(error)
        if self._ending or self._writer.finish(is_cut=True):
            self._writer.items[-1]["status"] = "incomplete"
        code = "server_error" if error.status >= 500 else "rate_limit_exceeded" if error.status == 429 else "invalid_prompt"
        failure = {"code": code, "message": named.message, "type": named.code, "param": named.param}
        failed = {**self._head, "status": "failed", "error": failure, "output": self._writer.items}
        failed |= {"output_text": self._writer.text, "usage": _usage(usage)}
        return self._numbered([{"type": "response.failed", "response": failed}])[0]

    def response(self, answers: list[FinishedAnswer], usage: Usage) -> dict[str, Any]:
        [answer] = answers
        self.chunks(Delta(0, answer.text, answer.logprobs, answer.finish_reason, answer.events, answer.offsets))
        return self.finish(usage)

    def finish(self, usage: Usage) -> dict[str, Any]:
        """The whole response, once: to be kept before the client is told of it in `last_chunks`."""
        self._ending = self._writer.finish(is_cut=self._is_cut)
        status, details = _CUTS.get(self._finish_reason, ("completed", None))
        self.final = {
            **self._head,
            "status": status,
            "completed_at": None if self._is_cut else int(time.time()),
            "incomplete_details": details,
            "output": self._writer.items,
            "output_text": self._writer.text,
            "usage": _usage(usage),
            **self._warnings,
            **self._extras,
            **self._report(),
        }
        return self.final

    @property
    def _is_cut(self) -> bool:
        return self._finish_reason in _CUTS

    def _numbered(self, chunks: list[Chunk]) -> list[Chunk]:
        for chunk in chunks:
            self._number += 1
            chunk["sequence_number"] = self._number
        return chunks


def response_head(body: CreateResponse, *, response_id: str, model: str, defaults: SamplingDefaults) -> dict[str, Any]:
    """The response before its output: what was asked for, with the values that were left out."""
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "model": model,
        "output": [],
        "output_text": "",
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.is_stored,
        "temperature": defaults.temperature if body.temperature is None else body.temperature,
        "text": {"format": _text_format(body), "verbosity": "medium"},
        "tool_choice": _tool_choice(body.tool_choice),
        "tools": [_tool(tool) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": defaults.top_p if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0, "image_tokens": usage.image_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _text_format(body: CreateResponse) -> dict[str, Any]:
    given = body.text.format if body.text is not None else None
    if not isinstance(given, TextFormatJsonSchema):
        return {"type": given.type if given is not None else "text"}
    names = {"name": given.name, "description": given.description, "strict": given.strict}
    return {"type": given.type, "schema": given.schema_, **names}


def _tool(tool: FunctionTool) -> dict[str, Any]:
    described = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": tool.type, **described, "strict": bool(tool.strict)}


def _tool_choice(choice: str | ToolChoiceFunction | ToolChoiceAllowed | None) -> str | dict[str, Any]:
    match choice:
        case ToolChoiceFunction(name=name):
            return {"type": choice.type, "name": name}
        case ToolChoiceAllowed(mode=mode, tools=tools):
            return {"type": choice.type, "mode": mode, "tools": [{"type": tool.type, "name": tool.name} for tool in tools]}
        case _:
            return choice or "auto"
