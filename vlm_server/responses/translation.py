"""A request of `/v1/responses` as a chat: items become messages, and every field of the chat remembers where it came from.

Instructions and the system and developer messages at the beginning become one system message, as many chat templates know one only. What
the assistant thought, said and called in a row becomes one message of the assistant's. Knows nothing of HTTP or of what is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from vlm_server.errors import bad_request, validation_error
from vlm_server.format_protocol import JsonObjectFormat
from vlm_server.protocol import ChatCompletionRequest
from vlm_server.responses.field_paths import FieldPaths, Place
from vlm_server.responses.items import (
    AnyItem,
    ContentPart,
    FunctionCallOutput,
    FunctionToolCall,
    InputImageContent,
    InputTextContent,
    Message,
    OutputTextContent,
    ReasoningItem,
    RefusalContent,
)
from vlm_server.responses.request import (
    SAME_AS_IN_CHATS,
    CreateResponse,
    FunctionTool,
    TextFormatJsonSchema,
    ToolChoiceAllowed,
    ToolChoiceFunction,
)

_SYSTEM = ("system", "developer")
_EARLIER = Place("previous_response_id", is_whole=True)
_INSTRUCTIONS = Place("instructions", is_whole=True)

# Where the chat's fields come from that have another name there.
_PLACES = {
    "messages": Place("input"),
    "max_tokens": Place("max_output_tokens"),
    "reasoning_effort": Place("reasoning.effort"),
    "response_format": Place("text.format"),
    "response_format.json_schema": Place("text.format"),
    "logprobs": Place("include"),
    "tool_choice.function": Place("tool_choice"),
    "tool_choice.allowed_tools": Place("tool_choice"),
}


@dataclass(frozen=True, slots=True)
class _Part:
    value: dict[str, Any]
    place: Place

    @property
    def is_text(self) -> bool:
        return bool(self.value["type"] == "text")


@dataclass(slots=True)
class _Draft:
    """A message of the chat while items are added to it."""

    role: str
    place: Place
    parts: list[_Part] = field(default_factory=list)
    has_content: bool = False  # also where that is empty
    calls: list[tuple[FunctionToolCall, Place]] = field(default_factory=list)
    reasoning: list[ReasoningItem] = field(default_factory=list)
    call_id: str | None = None

    def content(self) -> str | list[dict[str, Any]] | None:
        if not self.parts:
            return None if self.calls and not self.has_content else ""
        if all(part.is_text for part in self.parts) and (len(self.parts) == 1 or self.role in ("assistant", *_SYSTEM)):
            return ("\n\n" if self.role in _SYSTEM else "").join(part.value["text"] for part in self.parts)
        return [part.value for part in self.parts]

    def as_dict(self) -> dict[str, Any]:
        calls = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call, _ in self.calls
        ]
        optional = {
            "reasoning_content": "".join(item.text for item in self.reasoning),
            "tool_calls": calls or None,
            "tool_call_id": self.call_id,
        }
        return {"role": self.role, "content": self.content()} | {name: value for name, value in optional.items() if value}

    def places(self, path: str) -> dict[str, Place]:
        """path: of the message in the chat."""
        places = {path: self.place, f"{path}.tool_call_id": self.place / ".call_id"}
        for index, (_, place) in enumerate(self.calls):
            call = f"{path}.tool_calls[{index}]"
            places |= {call: place, f"{call}.id": place / ".call_id", f"{call}.function": place}
        for index, part in enumerate(self.parts):
            places |= _places_of_part(f"{path}.content[{index}]", part)
        return places


def _places_of_part(path: str, part: _Part) -> dict[str, Place]:
    if part.is_text:
        return {path: part.place}
    source = part.place / (".file_id" if "file_id" in part.value["image_url"] else ".image_url")
    image = f"{path}.image_url"
    return {path: part.place, image: source, f"{image}.url": source, f"{image}.file_id": source, f"{image}.detail": part.place / ".detail"}


@dataclass(frozen=True, slots=True)
class TranslatedChat:
    request: ChatCompletionRequest
    paths: FieldPaths


def translated(body: CreateResponse, earlier: Sequence[AnyItem], *, model: str) -> TranslatedChat:
    """The chat that continues the conversation. earlier: the items of the response before it.

    Raises ApiError 400 for what chats refuse, under the client's names, and for items that come twice.
    """
    _check_ids(body, earlier)
    drafts = _with_one_system([*_instructions(body), *_drafts([*((item, _EARLIER) for item in earlier), *_new_items(body)])])
    places = dict(_PLACES)
    for index, draft in enumerate(drafts):
        places |= draft.places(f"messages[{index}]")
    for index in range(len(body.tools or ())):
        places[f"tools[{index}].function"] = Place(f"tools[{index}]")
    if isinstance(body.tool_choice, ToolChoiceAllowed):
        for index in range(len(body.tool_choice.tools)):
            places[f"tool_choice.allowed_tools.tools[{index}].function"] = Place(f"tool_choice.tools[{index}]")
    paths = FieldPaths(places)
    fields = {"model": model, "messages": [draft.as_dict() for draft in drafts], **_fields(body)}
    try:
        return TranslatedChat(ChatCompletionRequest.model_validate(fields), paths)
    except ValidationError as error:
        found = [{**detail, "loc": ("body", *detail["loc"])} for detail in error.errors(include_url=False, include_input=False)]
        raise paths.error(validation_error(found, is_json=True)) from error


def new_items(body: CreateResponse) -> list[AnyItem]:
    """The request's input as items."""
    return [item for item, _ in _new_items(body)]


def _new_items(body: CreateResponse) -> list[tuple[AnyItem, Place]]:
    if isinstance(body.input, str):
        return [(Message(role="user", content=body.input), Place("input", is_whole=True))]
    return [(item, Place(f"input[{index}]")) for index, item in enumerate(body.input)]


def _check_ids(body: CreateResponse, earlier: Sequence[AnyItem]) -> None:
    """Ids tell items apart when they are listed; who sends earlier items again has the conversation twice."""
    known = {item.id for item in earlier}
    for item, place in _new_items(body):
        if item.id is not None and item.id in known:
            path = f"{place.path}.id"
            message = f"{path}: this item is in the conversation already; with previous_response_id only new items are sent"
            raise bad_request("duplicate_item", message, param=path)
        known.add(item.id)


def _instructions(body: CreateResponse) -> list[_Draft]:
    if body.instructions is None:
        return []
    part = _Part({"type": "text", "text": body.instructions}, _INSTRUCTIONS)
    return [_Draft("system", _INSTRUCTIONS, [part], has_content=True)]


def _drafts(items: Sequence[tuple[AnyItem, Place]]) -> list[_Draft]:
    drafts: list[_Draft] = []
    for item, place in items:
        match item:
            case Message(role="assistant"):
                draft = _assistant(drafts, place, follows=lambda last: not last.has_content or bool(last.calls))
                draft.parts += _parts(item.content, place / ".content")
                draft.has_content = True
            case Message():
                drafts.append(_Draft(item.role, place, _parts(item.content, place / ".content"), has_content=True))
            case FunctionToolCall():
                _assistant(drafts, place, follows=lambda last: True).calls.append((item, place))
            case FunctionCallOutput():
                parts = _parts(item.output, place / ".output")
                drafts.append(_Draft("tool", place, parts, has_content=True, call_id=item.call_id))
            case ReasoningItem():
                _assistant(drafts, place, follows=lambda last: not (last.has_content or last.calls)).reasoning.append(item)
    return drafts


def _assistant(drafts: list[_Draft], place: Place, *, follows: Callable[[_Draft], bool]) -> _Draft:
    """The assistant's message that an item belongs to: the last one, where the item follows what that has, or a new one."""
    if not drafts or drafts[-1].role != "assistant" or not follows(drafts[-1]):
        drafts.append(_Draft("assistant", place))
    return drafts[-1]


def _parts(content: str | Sequence[ContentPart], place: Place) -> list[_Part]:
    if isinstance(content, str):
        return [_Part({"type": "text", "text": content}, place)] if content else []
    return [_Part(chat_part(part), place / f"[{index}]") for index, part in enumerate(content)]


def chat_part(part: ContentPart) -> dict[str, Any]:
    """A part of a chat message's content."""
    match part:
        case InputImageContent():
            source = {"file_id": part.file_id} if part.file_id is not None else {"url": part.image_url}
            detail = {} if part.detail in (None, "auto") else {"detail": part.detail}
            return {"type": "image_url", "image_url": source | detail}
        case RefusalContent():
            return {"type": "text", "text": part.refusal}
        case InputTextContent() | OutputTextContent():
            return {"type": "text", "text": part.text}


def _with_one_system(drafts: list[_Draft]) -> list[_Draft]:
    num_leading = next((index for index, draft in enumerate(drafts) if draft.role not in _SYSTEM), len(drafts))
    if num_leading < 2:
        return drafts
    leading = drafts[:num_leading]
    parts = [part for draft in leading for part in draft.parts]
    return [_Draft("system", leading[0].place, parts, has_content=True), *drafts[num_leading:]]


def _fields(body: CreateResponse) -> dict[str, Any]:
    """The chat's fields beside its messages; those that are not given are absent."""
    fields = {name: getattr(body, name) for name in SAME_AS_IN_CHATS}
    fields |= {
        "stream": body.stream,
        "max_tokens": body.max_output_tokens,
        "reasoning_effort": body.reasoning.effort if body.reasoning is not None else None,
        "logprobs": True if body.has_logprobs else None,
        "top_logprobs": body.top_logprobs,
        "response_format": _response_format(body),
        "tools": [_tool(tool) for tool in body.tools or ()] or None,
        "tool_choice": _tool_choice(body),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _response_format(body: CreateResponse) -> object:
    match body.text.format if body.text is not None else None:
        case TextFormatJsonSchema() as described:
            names = {"name": described.name, "description": described.description, "strict": described.strict}
            return {"type": "json_schema", "json_schema": {"schema": described.schema_, **names}}
        case JsonObjectFormat() as any_object:
            return any_object
        case _:
            return None


def _tool(tool: FunctionTool) -> dict[str, Any]:
    given = tool.model_dump(include={"name", "description", "parameters", "strict"}, exclude_none=True)
    return {"type": "function", "function": given}


def _tool_choice(body: CreateResponse) -> object:
    match body.tool_choice:
        case ToolChoiceFunction() as named:
            return _reference(named)
        case ToolChoiceAllowed() as allowed:
            return {"type": "allowed_tools", "allowed_tools": {"mode": allowed.mode, "tools": list(map(_reference, allowed.tools))}}
        case choice:
            return choice


def _reference(choice: ToolChoiceFunction) -> dict[str, Any]:
    return {"type": "function", "function": {"name": choice.name}}
