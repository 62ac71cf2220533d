"""The request of `/v1/chat/interactive`, as LMDeploy had it until 0.9, with that route's own defaults.

Checks shape and bounds only; what a turn does is not known here.
"""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from vlm_server.image_protocol import OnMediaError, ReturnImageSizes
from vlm_server.message_schema import ChatMessage, UnicodeText
from vlm_server.protocol import RETURN_TIMINGS, GenerationFields, StopStrings

NO_SESSION = -1

_Turn = Annotated[
    Annotated[UnicodeText | None, Tag("<string>")] | Annotated[list[ChatMessage], Field(min_length=1), Tag("<messages>")],
    Discriminator(lambda value: "<messages>" if isinstance(value, list) else "<string>"),
]
_Pictures = Annotated[
    Annotated[UnicodeText | None, Tag("<string>")] | Annotated[list[UnicodeText], Tag("<strings>")],
    Discriminator(lambda value: "<strings>" if isinstance(value, list) else "<string>"),
]


# What a turn's request and `GenerationFields` call alike.
_SAME_NAMES = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_new_tokens"),
    *("stop", "ignore_eos", "skip_special_tokens"),
)


class TurnFields(GenerationFields):
    """A turn's sampling fields under the names that all routes know."""

    input_field: ClassVar[str] = "prompt"


class GenerateRequest(BaseModel):
    """One turn of a conversation that the server keeps, or a whole one that it does not. A null field is as good as an absent one."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = Field(None, description="One of the ids of GET /v1/models; may be left out.")
    prompt: _Turn = Field(None, description="What the user says now; or messages, which are put behind the session's.")
    messages: _Turn = Field(None, description="Another name for prompt.")
    image_url: _Pictures = Field(
        None,
        description="Pictures that come with a prompt that is a string: http, https or data: URLs; under --allowed-local-media-path also "
        "file: URLs and paths.",
    )
    on_media_error: OnMediaError = None
    return_image_sizes: ReturnImageSizes = None
    session_id: int = Field(
        NO_SESSION, ge=-(2**63), lt=2**63, description="Which conversation this turn belongs to, of those of the API key; -1: none."
    )
    interactive_mode: bool = Field(False, description="Keep the session after the answer; false: end it, once it was used for this answer.")
    stream: bool = Field(False, description="Answer in lines of JSON while the answer is written.")
    cancel: bool = Field(False, description="Stop the session's running turn, which leaves the history as it was; nothing else is done.")
    stop: StopStrings = Field(None, description="End before any of these strings, of any length.")
    request_output_len: int | None = Field(
        None,
        ge=0,
        lt=2**31,
        description="New tokens at most; default: to the end of the window. 0, with an empty prompt and without interactive_mode, ends the "
        "session.",
    )
    temperature: float = Field(0.8, ge=0, le=2, description="0 is greedy.")
    top_p: float = Field(0.8, gt=0, le=1, description="Keep the most likely tokens that together reach this probability.")
    top_k: int = Field(40, ge=-1, lt=2**31, description="Keep the k most likely tokens; 0 or -1: all.")
    min_p: float = Field(0.0, ge=0, le=1, description="Drop tokens less likely than this share of the most likely one.")
    repetition_penalty: float = Field(1.0, gt=0, le=100, description="Above 1: tokens of prompt and output get less likely.")
    ignore_eos: bool = Field(False, description="Go on to request_output_len: end tokens cannot be chosen.")
    skip_special_tokens: bool = Field(True, description="Leave special tokens out of the text.")
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="The same request with the same seed gives the same answer. 0, as null: none."
    )
    min_new_tokens: int | None = Field(None, ge=0, lt=2**31, description="No end before as many new tokens.")
    return_timings: bool = Field(False, description=RETURN_TIMINGS)

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_absent(cls, value: object, info: ValidationInfo) -> object:
        assert info.field_name
        return cls.model_fields[info.field_name].default if value is None else value

    @field_validator("messages")
    @classmethod
    def _one_of_two(cls, value: _Turn, info: ValidationInfo) -> _Turn:
        if value is not None and info.data.get("prompt") is not None:
            raise PydanticCustomError("api:invalid_value", "another name of prompt; give one of the two")
        return value

    @field_validator("image_url")
    @classmethod
    def _only_with_a_string(cls, value: _Pictures, info: ValidationInfo) -> _Pictures:
        if value and any(isinstance(info.data.get(name), list) for name in ("prompt", "messages")):
            raise PydanticCustomError("api:invalid_value", "only with a prompt that is a string; messages hold their pictures themselves")
        return value

    @property
    def turn(self) -> str | list[ChatMessage] | None:
        return self.messages if self.prompt is None else self.prompt

    @property
    def ends_session(self) -> bool:
        """The one use of a length of 0."""
        return self.turn == "" and not self.image_url and self.request_output_len == 0 and not self.interactive_mode

    def new_messages(self) -> list[dict[str, Any]]:
        """The turn as messages: one of the user's, its pictures before its text, or those that were sent."""
        turn = self.turn
        if isinstance(turn, list):
            return [message.as_dict() for message in turn]
        pictures = [{"type": "image_url", "image_url": {"url": _as_url(url)}} for url in self._image_urls()]
        text = turn or ""
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}] if pictures else text}]

    def picture_fields(self) -> Iterator[tuple[int, int, str]]:
        """(message, part, the field's path in the request) of every picture in `new_messages`."""
        for index, _ in enumerate(self._image_urls()):
            yield 0, index, f"image_url[{index}]" if isinstance(self.image_url, list) else "image_url"
        turn, name = self.turn, "messages" if self.prompt is None else "prompt"
        for number, message in enumerate(turn if isinstance(turn, list) else ()):
            for index, part in enumerate(message.content if isinstance(message.content, list) else ()):
                if part.type == "image_url":
                    yield number, index, f"{name}[{number}].content[{index}].image_url"

    def turn_fields(self, model: str) -> TurnFields:
        fields = {name: getattr(self, name) for name in _SAME_NAMES}
        return TurnFields.model_validate({**fields, "model": model, "seed": self.seed or None, "max_tokens": self.request_output_len})

    def _image_urls(self) -> list[str]:
        return self.image_url if isinstance(self.image_url, list) else [self.image_url] if self.image_url else []


def _as_url(url: str) -> str:
    """A path of the server's as the file: URL that it means."""
    return f"file://{quote(url)}" if url.startswith("/") else url
