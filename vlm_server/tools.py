"""One request's tools: whether they can be served, which of them the answer may call, and how its text is read.

Knows nothing of templates or of HTTP; what cannot be served is an ApiError 400 that names the field.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm_server.answer_formats import AnswerFormats
from vlm_server.errors import bad_request
from vlm_server.parsing.answer import AnswerParser
from vlm_server.parsing.calls import CallReader
from vlm_server.parsing.reasoning import ReasoningFormat, ReasoningReader
from vlm_server.parsing.tool_formats import ToolFormat
from vlm_server.protocol import ChatCompletionRequest
from vlm_server.tool_schema import Tool


@dataclass(frozen=True, slots=True)
class CallTag:
    """One function's call as a grammar must have it: `begin`, JSON of `schema`, `end`."""

    begin: str
    schema: dict[str, Any]
    end: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallStructure:
    """What a grammar must enforce: `opening`, one of `tags` or several with `separator` between them, `closing`.

    is_forced: the answer is that and nothing else. Otherwise any text may come before it, and what begins a call must go on as one.
    """

    is_forced: bool
    opening: str
    tags: tuple[CallTag, ...]
    separator: str
    closing: str
    max_calls: int | None

    def trigger(self, markers: Sequence[str]) -> str | None:
        """The marker with which every call begins; None where calls look like any text."""
        begins = [self.opening] if self.opening else [tag.begin for tag in self.tags]
        return next((marker for marker in markers if all(begin.startswith(marker) for begin in begins)), None)


def call_structure(request: ChatCompletionRequest, format: ToolFormat) -> CallStructure | None:
    """What the answer to a request must follow in the format of the model; None where no grammar is needed.

    Needed for `tool_choice` required or a named function, for tools that are `strict` (others take any object as arguments), and where
    an answer without calls has a fixed form.
    """
    tools = request.callable_tools()
    if not (request.must_call or request.has_fixed_form or any(tool.function.strict for tool in tools)):
        return None
    return CallStructure(
        is_forced=request.must_call,
        opening=format.opening,
        tags=tuple(_call_tag(tool, format, is_forced=request.must_call) for tool in tools),
        separator=format.separator,
        closing=format.closing,
        max_calls=1 if request.parallel_tool_calls is False or request.names_one_tool else None,
    )


def _call_tag(tool: Tool, format: ToolFormat, *, is_forced: bool) -> CallTag:
    follows_schema = is_forced or tool.function.strict
    schema = tool.function.schema_of_arguments if follows_schema else {"type": "object"}
    return CallTag(format.begin_of(tool.function.name), schema, format.end)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPlan:
    """How one request's answers are read: which tools they may call and which formats their text is in."""

    tools: Sequence[Tool]
    format: ToolFormat | None
    reasoning: ReasoningFormat | None
    one_call: bool
    structure: CallStructure | None = None  # what a grammar must enforce

    @property
    def is_plain(self) -> bool:
        """Whether all text is content."""
        return self.format is None and self.reasoning is None

    @property
    def markers(self) -> tuple[str, ...]:
        """Words that must be in the text, also where they are special tokens."""
        reasoning = (self.reasoning.opening, self.reasoning.closing) if self.reasoning is not None else ()
        return (*reasoning, *(self.format.markers if self.format is not None else ()))

    def template_tools(self) -> list[dict[str, Any]] | None:
        return [tool.as_dict() for tool in self.tools] or None

    def begins_in_reasoning(self, prompt_end: str, continued: str) -> bool:
        """prompt_end: the last of the prompt's text; continued: the text of an assistant's message that the answer continues."""
        if self.reasoning is None:
            return False
        return prompt_end.rstrip().endswith(self.reasoning.opening) or self.reasoning.is_open_after(continued)

    def parser(self, *, in_reasoning: bool) -> AnswerParser:
        """A new one, for one answer."""
        reasoning = ReasoningReader(self.reasoning, is_open=in_reasoning) if self.reasoning is not None else None
        names = [tool.function.name for tool in self.tools]
        calls = CallReader(self.format.read, names) if self.format is not None else None
        return AnswerParser(reasoning=reasoning, calls=calls, one_call=self.one_call)


def plan_answer(request: ChatCompletionRequest, formats: AnswerFormats) -> AnswerPlan:
    """Raises ApiError 400 for tools, or a choice among them, that this model or this server cannot serve."""
    tools, structure = request.callable_tools(), None
    if tools:
        check_tools(formats)
        assert formats.tools is not None
        structure = call_structure(request, formats.tools)
        if structure is not None:
            _check_enforceable(request, structure, formats.tools)
    one_call = request.parallel_tool_calls is False
    format = formats.tools if tools else None
    return AnswerPlan(tools=tools, format=format, reasoning=formats.reasoning, one_call=one_call, structure=structure)


def check_tools(formats: AnswerFormats) -> None:
    """Raises ApiError 400 where the model's tools cannot be written or read."""
    if formats.tools is None:
        message = "tools: this model has no format for calls that is known here; start the server with --tool-call-parser NAME"
        raise bad_request("tools_not_supported", message, param="tools")
    if not formats.shows_tools:
        message = "tools: the model's chat template writes none into the prompt; start the server with --chat-template FILE that does"
        raise bad_request("tools_not_supported", message, param="tools")


def _check_enforceable(request: ChatCompletionRequest, structure: CallStructure, format: ToolFormat) -> None:
    """Raises ApiError 400 for what no grammar can enforce in this model's format."""
    if request.ignore_eos:
        message = "ignore_eos: a grammar says where the answer ends; only false is allowed with forced calls and strict tools"
        raise bad_request("invalid_value", message, param="ignore_eos")
    if structure.is_forced or request.has_fixed_form or structure.trigger(format.markers) is not None:
        return
    index = next(index for index, tool in enumerate(request.tools or ()) if tool.function.strict)
    path = f"tools[{index}].function.strict"
    message = f"{path}: this model's calls look like any text; strict is possible with tool_choice required only"
    raise bad_request("unsupported_parameter", message, param=path)
