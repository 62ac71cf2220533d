"""The shape of a chat's messages: roles, text parts and image parts, calls of functions and their results.

Checks shape only; whether a picture's URL may be fetched is the vision package's to say. Names that begin with < are tags of unions:
they show up in pydantic's locations and are dropped from the paths in error messages.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from vlm_server.image_protocol import MaxPixels, MinPixels
from vlm_server.nesting import is_too_deep

_OTHER_MEDIA = {
    "input_audio": "audio",
    "audio_url": "audio",
    "audio": "audio",
    "video_url": "video",
    "video": "video",
    "input_video": "video",
    "file": "file",
    "time_series_url": "time series",
}


def _encodable(value: str) -> str:
    """Refuses half a surrogate pair, which JSON can write and no tokenizer can read."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("api:invalid_value", "not Unicode text: half of a surrogate pair") from None
    return value


UnicodeText = Annotated[str, AfterValidator(_encodable)]


class ImageUrl(BaseModel):
    """Where a picture is: at a URL, or among the uploaded files."""

    model_config = ConfigDict(extra="allow")

    file_id: UnicodeText | None = Field(None, description="In place of url: the id of a file that POST /v1/files was given.")
    url: UnicodeText | None = Field(
        None, validate_default=True, description="An http, https or data: URL; file: only under --allowed-local-media-path."
    )
    detail: Literal["auto", "low", "high"] | None = Field(
        None,
        description="low: at most 512 × 512 pixels, in one tile where the model can; auto: its default; high: that, with Gemma 3's crops.",
    )
    min_pixels: MinPixels = None
    max_pixels: MaxPixels = None

    @field_validator("url")
    @classmethod
    def _one_of_two(cls, value: str | None, info: ValidationInfo) -> str | None:
        file_id = info.data.get("file_id")
        if value is None and file_id is None:
            raise PydanticCustomError("missing", "Field required, or file_id in its place")
        if value is not None and file_id is not None:
            raise PydanticCustomError("api:invalid_value", "not together with file_id; give one of the two")
        return value


class TextPart(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["text"]
    text: UnicodeText = Field(description="Text at this place of the message.")

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)


def _is_string(value: object) -> str:
    return "<string>" if isinstance(value, str) else "<other>"


class ImagePart(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["image_url"]
    image_url: Annotated[Annotated[UnicodeText, Tag("<string>")] | Annotated[ImageUrl, Tag("<other>")], Discriminator(_is_string)] = Field(
        description="A picture at this place of the message: its URL, or an object that holds it."
    )
    min_pixels: MinPixels = None
    max_pixels: MaxPixels = None

    def as_dict(self) -> dict[str, Any]:
        """What the client sent, without nulls; a bare string as `image_url` is written out as an object."""
        image = self.image_url
        written = {"url": image} if isinstance(image, str) else image.model_dump(exclude_unset=True, exclude_none=True)
        return {**self.model_dump(exclude_unset=True), "image_url": written}


def _known_part(value: object) -> object:
    """Refuses the parts of other media by name."""
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict):
        raise PydanticCustomError("api:invalid_value", "a part is an object with a type")
    if isinstance(kind, str) and kind in _OTHER_MEDIA:
        message = "{medium} parts are not supported, only text and image_url"
        raise PydanticCustomError("api:unsupported_content_type", message, {"medium": _OTHER_MEDIA[kind]})
    if kind not in ("text", "image_url"):
        raise PydanticCustomError("api:invalid_value", "the part's type must be text or image_url")
    return value


def _part_kind(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>"


ContentPart = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")],
    Discriminator(_part_kind),
    BeforeValidator(_known_part),
]


class CalledFunction(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: Annotated[UnicodeText, Field(min_length=1)] = Field(description="The function's.")
    arguments: UnicodeText = Field(description="JSON text.")


class ToolCall(BaseModel):
    """A call that the assistant made in an earlier turn."""

    model_config = ConfigDict(extra="allow")

    id: UnicodeText = Field(description="What the message with the result names in its tool_call_id.")
    type: Literal["function"] = "function"
    function: CalledFunction = Field(description="What was called.")
    index: int | None = Field(None, description="Accepted, without effect: clients that streamed the call send it back.")

    def as_dict(self) -> dict[str, Any]:
        """For the chat template: arguments as the object that they write, or as their text where they write none."""
        name, arguments = self.function.name, _object_in(self.function.arguments)
        return {"id": self.id, "type": self.type, "function": {"name": name, "arguments": arguments}}


def _object_in(text: str) -> dict[str, Any] | str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) and not is_too_deep(value) else text


def _known_role(value: object) -> object:
    if value == "function":
        raise PydanticCustomError("api:unsupported_role", "not supported; results of functions are messages of the role tool")
    return value


def one_of_two_names(value: object, info: ValidationInfo) -> object:
    """Refuses a message's text under its second name that differs from that under its first, `content`."""
    if value is not None and info.data.get("content") not in (None, value):
        raise PydanticCustomError("api:invalid_value", "another name of content; give one of the two")
    return value


Content = Annotated[
    Annotated[UnicodeText | None, Tag("<string>")] | Annotated[list[ContentPart], Tag("<parts>")],
    Discriminator(lambda value: "<parts>" if isinstance(value, list) else "<string>"),
]


class ChatMessage(BaseModel):
    """One message. `content` is a string or a list of text and image parts, in any order."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[Literal["system", "developer", "user", "assistant", "tool"], BeforeValidator(_known_role)] = Field(
        description="Who speaks."
    )
    content: Content = Field(None, description="A text, or parts: texts and pictures in any order.")
    message: Content = Field(None, description="Another name for content, as Chinese-LLaMA-Alpaca's clients write it.")
    name: UnicodeText | None = Field(None, description="Passed to the chat template.")
    reasoning_content: UnicodeText | None = Field(None, description="Of an assistant's message; passed to the chat template.")
    tool_calls: list[ToolCall] | None = Field(None, description="Of an assistant's message: what it called.")
    tool_call_id: UnicodeText | None = Field(None, validate_default=True, description="Of a tool's message: which call it answers.")

    @field_validator("message")
    @classmethod
    def _is_the_content(cls, value: object, info: ValidationInfo) -> object:
        return one_of_two_names(value, info)

    @model_validator(mode="after")
    def _under_one_name(self) -> Self:
        if self.message is not None:
            self.content, self.message = self.message, None
        return self

    @field_validator("tool_calls", "reasoning_content")
    @classmethod
    def _of_an_assistant(cls, value: list[ToolCall] | str | None, info: ValidationInfo) -> list[ToolCall] | str | None:
        if value and info.data.get("role", "assistant") != "assistant":
            raise PydanticCustomError("api:invalid_value", "only in messages of the assistant")
        return value

    @field_validator("tool_call_id")
    @classmethod
    def _of_a_tool(cls, value: str | None, info: ValidationInfo) -> str | None:
        role = info.data.get("role")
        if role == "tool" and not value:
            raise PydanticCustomError("missing", "a message of the role tool needs the id of the call that it answers")
        if role not in ("tool", None) and value is not None:
            raise PydanticCustomError("api:invalid_value", "only in messages of the role tool")
        return value

    def as_dict(self) -> dict[str, Any]:
        """What the client sent, for the chat template."""
        message = self.model_dump(exclude_unset=True, include=set(ChatMessage.model_fields) - {"tool_calls", "message"})
        if isinstance(self.content, list):
            message["content"] = [part.as_dict() for part in self.content]
        return message | ({"tool_calls": [call.as_dict() for call in self.tool_calls]} if self.tool_calls else {})


def check_ending(messages: Sequence[ChatMessage], *, adds_prompt: bool | None, continues: bool | None) -> None:
    """Refuses `continue_final_message` where there is nothing to continue. Raises PydanticCustomError."""
    if not continues:
        return
    last = messages[-1]
    has_text = any(isinstance(part, TextPart) and part.text for part in last.content) if isinstance(last.content, list) else last.content
    if last.role != "assistant" or not has_text or last.tool_calls:
        raise PydanticCustomError("api:invalid_value", "the last message must be the assistant's, with text and without calls")
    if adds_prompt:
        raise PydanticCustomError("api:invalid_value", "not together with add_generation_prompt: true")
