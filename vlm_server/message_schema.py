"""The shape of a chat's messages: roles, text parts and image parts.

Checks shape only; whether a picture's URL may be fetched is the vision package's to say. Names that begin with < are tags of unions:
they show up in pydantic's locations and are dropped from the paths in error messages.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

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
    """Where a picture is."""

    model_config = ConfigDict(extra="allow")

    url: UnicodeText = Field(description="An http, https or data: URL; file: only under --allowed-local-media-path.")
    detail: Literal["auto", "low", "high"] | None = Field(None, description="The picture's resolution as the model sees it.")


class TextPart(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["text"]
    text: UnicodeText

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)


def _is_string(value: object) -> str:
    return "<string>" if isinstance(value, str) else "<other>"


class ImagePart(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["image_url"]
    image_url: Annotated[Annotated[UnicodeText, Tag("<string>")] | Annotated[ImageUrl, Tag("<other>")], Discriminator(_is_string)]

    def as_dict(self) -> dict[str, Any]:
        """What the client sent; a bare string as `image_url` is written out as an object."""
        part = self.model_dump(exclude_unset=True)
        if isinstance(part["image_url"], str):
            part["image_url"] = {"url": part["image_url"]}
        return part


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


def _known_role(value: object) -> object:
    if value in ("tool", "function"):
        raise PydanticCustomError("api:unsupported_role", "messages of tools are not supported yet")
    return value


class ChatMessage(BaseModel):
    """One message. `content` is a string or a list of text and image parts, in any order."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_known_role)]
    content: Annotated[
        Annotated[UnicodeText | None, Tag("<string>")] | Annotated[list[ContentPart], Tag("<parts>")],
        Discriminator(lambda value: "<parts>" if isinstance(value, list) else "<string>"),
    ] = None
    name: UnicodeText | None = Field(None, description="Passed to the chat template.")

    def as_dict(self) -> dict[str, Any]:
        """What the client sent, for the chat template."""
        message = self.model_dump(exclude_unset=True)
        if isinstance(self.content, list):
            message["content"] = [part.as_dict() for part in self.content]
        return message
