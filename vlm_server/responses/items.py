"""The items of a conversation as `/v1/responses` has them: messages, calls of functions, their outputs, and reasoning.

What an answer gives as output is valid input again. Checks shape only; what items mean to the model is `translation`'s to say.
"""

import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from vlm_server.message_schema import UnicodeText

MAX_ITEMS = 4096

_Words = Annotated[UnicodeText, Field(description="The text.")]
_CallId = Annotated[UnicodeText, Field(min_length=1, description="Which call is answered by which output.")]
_Id = Annotated[UnicodeText | None, Field(description="Kept and given back.")]
_Status = Annotated[Literal["in_progress", "completed", "incomplete"] | None, Field(description="Accepted, without effect.")]


class InputTextContent(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["input_text", "text"] = Field(description="input_text; text, LMDeploy's, is another name.")
    text: _Words


class OutputTextContent(BaseModel):
    """What the assistant said."""

    model_config = ConfigDict(extra="allow")

    type: Literal["output_text"]
    text: _Words
    annotations: list[dict[str, Any]] | None = Field(None, description="Accepted, without effect.")
    logprobs: list[dict[str, Any]] | None = Field(None, description="Accepted, without effect.")


class RefusalContent(BaseModel):
    """What the assistant refused with: text as any other to the model."""

    model_config = ConfigDict(extra="allow")

    type: Literal["refusal"]
    refusal: _Words


class InputImageContent(BaseModel):
    """A picture: one of `image_url` and `file_id`."""

    model_config = ConfigDict(extra="allow")

    type: Literal["input_image"]
    detail: Literal["auto", "low", "high"] | None = Field(None, description="The picture's resolution as the model sees it.")
    file_id: UnicodeText | None = Field(None, description="A picture that was sent to the server before.")
    image_url: UnicodeText | None = Field(
        None, validate_default=True, description="An http, https or data: URL; file: only under --allowed-local-media-path."
    )

    @field_validator("image_url")
    @classmethod
    def _one_of_two(cls, value: str | None, info: ValidationInfo) -> str | None:
        if "file_id" in info.data and (value is None) == (info.data["file_id"] is None):
            message = "one of image_url and file_id is needed, not both"
            raise PydanticCustomError("missing" if value is None else "api:invalid_value", message)
        return value


ContentPart = InputTextContent | OutputTextContent | RefusalContent | InputImageContent

_PARTS = ("input_text", "text", "output_text", "refusal", "input_image")


def _known_part(value: object) -> object:
    """Refuses the parts of other media by name."""
    if isinstance(value, BaseModel):
        return value
    if not isinstance(value, dict):
        raise PydanticCustomError("api:invalid_value", "a part is an object with a type")
    if value.get("type") not in _PARTS:
        message = "the part's type must be input_text, input_image or output_text; files, audio and video are not supported"
        raise PydanticCustomError("api:unsupported_content_type", message)
    return value


def told_apart_by_type(**models: type[BaseModel]) -> Any:
    """For `openapi.json`: which value of `type` is which model, as generators of clients want to know it."""
    mapping: Any = {name: f"#/components/schemas/{model.__name__}" for name, model in models.items()}
    return Field(json_schema_extra={"discriminator": {"propertyName": "type", "mapping": mapping}})


def kind_of(value: object) -> str:
    """The tag of a value that has a type."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>"


_AnyPart = Annotated[
    Annotated[InputTextContent, Tag("<text>")]
    | Annotated[OutputTextContent, Tag("<output_text>")]
    | Annotated[RefusalContent, Tag("<refusal>")]
    | Annotated[InputImageContent, Tag("<input_image>")],
    Discriminator(lambda value: kind_of(value).replace("input_text", "text")),
    BeforeValidator(_known_part),
    told_apart_by_type(
        input_text=InputTextContent,
        text=InputTextContent,
        output_text=OutputTextContent,
        refusal=RefusalContent,
        input_image=InputImageContent,
    ),
]
_Content = Annotated[
    Annotated[UnicodeText, Tag("<string>")] | Annotated[list[_AnyPart], Tag("<parts>")],
    Discriminator(lambda value: "<parts>" if isinstance(value, list) else "<string>"),
]


class Message(BaseModel):
    """A message; the assistant's may be an output item of an earlier response."""

    model_config = ConfigDict(extra="allow")

    type: Literal["message"] | None = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: _Content = Field(description="A text, or parts: texts and pictures in any order.")
    id: _Id = None
    status: _Status = None


class FunctionToolCall(BaseModel):
    """A call that the assistant made."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function_call"]
    call_id: _CallId
    name: Annotated[UnicodeText, Field(min_length=1, description="The function's.")]
    arguments: UnicodeText = Field(description="JSON text.")
    id: _Id = None
    status: _Status = None


class FunctionCallOutput(BaseModel):
    """What a called function gave, as text or as parts, pictures among them."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function_call_output"]
    call_id: _CallId
    output: _Content = Field(description="A text, or parts: texts and pictures in any order.")
    id: _Id = None
    status: _Status = None


class ReasoningText(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["reasoning_text"]
    text: _Words


class SummaryText(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["summary_text"]
    text: _Words


class ReasoningItem(BaseModel):
    """What the assistant thought before it spoke or called."""

    model_config = ConfigDict(extra="allow")

    type: Literal["reasoning"]
    summary: list[SummaryText] | None = Field(None, description="Passed to the chat template where there is no content.")
    content: list[ReasoningText] | None = Field(None, description="Passed to the chat template as the message's reasoning.")
    id: _Id = None
    status: _Status = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or self.summary or ())


_ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def _known_item(value: object) -> object:
    """Refuses the items of tools that only OpenAI has, and references to items, by name."""
    if isinstance(value, BaseModel):
        return value
    kind = (value.get("type") or "message") if isinstance(value, dict) else None
    if not isinstance(value, dict):
        raise PydanticCustomError("api:invalid_value", "an item is an object with a type")
    if kind not in _ITEMS:
        name = repr(kind)[:60] if isinstance(kind, str) else "this"
        message = "items of the type {name} are not supported, only message, function_call, function_call_output and reasoning"
        raise PydanticCustomError("api:unsupported_item", message, {"name": name})
    return value


def _item_kind(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind or 'message'}>"


InputItem = Annotated[
    Annotated[Message, Tag("<message>")]
    | Annotated[FunctionToolCall, Tag("<function_call>")]
    | Annotated[FunctionCallOutput, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    Discriminator(_item_kind),
    BeforeValidator(_known_item),
]
InputItems = Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS)]

AnyItem = Message | FunctionToolCall | FunctionCallOutput | ReasoningItem
ITEMS: TypeAdapter[list[AnyItem]] = TypeAdapter(list[InputItem])


def as_given_back(item: AnyItem) -> dict[str, Any]:
    """The item as `input_items` shows it and as it is kept: its content as parts, every field that OpenAI's clients ask for."""
    head = {"id": item.id or new_item_id(item.type or "message"), "type": item.type or "message", "status": "completed"}
    match item:
        case Message():
            return {**head, "role": item.role, "content": _parts_given_back(item.content, is_output=item.role == "assistant")}
        case FunctionToolCall():
            return {**head, "call_id": item.call_id, "name": item.name, "arguments": item.arguments}
        case FunctionCallOutput():
            output = item.output if isinstance(item.output, str) else _parts_given_back(item.output, is_output=False)
            return {**head, "call_id": item.call_id, "output": output}
        case ReasoningItem():
            return {**head, "summary": _texts(item.summary), "content": _texts(item.content)}


def new_item_id(kind: str) -> str:
    """kind: of an item, or `call` for the id by which a call is answered."""
    return f"{_ID_PREFIXES[kind]}_{uuid.uuid4().hex}"


_ID_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs", "call": "call"}


def _parts_given_back(content: str | list[ContentPart], *, is_output: bool) -> list[dict[str, Any]]:
    parts = [InputTextContent(type="input_text", text=content)] if isinstance(content, str) else content
    return [_part_given_back(part, is_output=is_output) for part in parts]


def _part_given_back(part: ContentPart, *, is_output: bool) -> dict[str, Any]:
    match part:
        case InputImageContent():
            return {"type": part.type, "detail": part.detail or "auto", "image_url": part.image_url, "file_id": part.file_id}
        case RefusalContent():
            return {"type": part.type, "refusal": part.refusal}
        case InputTextContent() | OutputTextContent():
            return text_part(part.text) if is_output else {"type": "input_text", "text": part.text}


def text_part(text: str, logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """A part of an answer."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def _texts(parts: list[ReasoningText] | list[SummaryText] | None) -> list[dict[str, Any]]:
    return [{"type": part.type, "text": part.text} for part in parts or ()]
