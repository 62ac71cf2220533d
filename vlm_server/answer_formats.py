"""In which format the served model writes calls and reasoning: as the flags say, else as its chat template shows.

Imports nothing heavy: the flags check their values here. Knows nothing of requests or of HTTP.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from vlm_server.parsing.reasoning import REASONING_ALIASES, REASONING_FORMATS, ReasoningFormat, reasoning_format_of
from vlm_server.parsing.tool_formats import TOOL_ALIASES, TOOL_FORMATS, ToolFormat, tool_format_of

AUTO, NONE = "auto", "none"

Format = TypeVar("Format")


@dataclass(frozen=True, slots=True)
class AnswerFormats:
    """None: calls, or reasoning, stay in the text as they are."""

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    shows_tools: bool = False  # the chat template writes a request's tools into the prompt

    @classmethod
    def choose(cls, tool_call_parser: str, reasoning_parser: str, *, template: str, shows_tools: bool) -> "AnswerFormats":
        """From the two flags' values; `auto` looks at the chat template's text. Raises ValueError for an unknown name."""
        tools = tool_format_of(template) if tool_call_parser == AUTO else tool_parser_name(tool_call_parser)
        reasoning = reasoning_format_of(template) if reasoning_parser == AUTO else reasoning_parser_name(reasoning_parser)
        return cls(TOOL_FORMATS.get(tools or NONE), REASONING_FORMATS.get(reasoning or NONE), shows_tools)


def tool_parser_name(text: str) -> str:
    """The name of the format that a value of --tool-call-parser means, or auto or none. Raises ValueError."""
    return _name(text, TOOL_FORMATS, TOOL_ALIASES)


def reasoning_parser_name(text: str) -> str:
    """As `tool_parser_name`, of --reasoning-parser."""
    return _name(text, REASONING_FORMATS, REASONING_ALIASES)


def _name(text: str, formats: Mapping[str, Format], aliases: Mapping[str, str]) -> str:
    name = text.lower().replace("_", "-")
    name = aliases.get(name, name)
    if name not in (AUTO, NONE, *formats):
        raise ValueError(f"{text!r} is no parser; there are {', '.join((AUTO, NONE, *formats, *aliases))}")
    return name
