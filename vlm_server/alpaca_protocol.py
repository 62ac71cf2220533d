"""Requests and answers of `--compat alpaca`: what Chinese-LLaMA-Alpaca's clients send, and the shapes that they read.

All that generation can be asked for on OpenAI's routes may be asked for here; only defaults, messages and answers differ. Becomes OpenAI's
requests, with this server's prompt in the conversation's place.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from vlm_server.alpaca import CHAT_DEFAULTS, COMPLETION_DEFAULTS, Turn
from vlm_server.embedding_protocol import MAX_INPUTS
from vlm_server.message_schema import TextPart, UnicodeText, one_of_two_names
from vlm_server.protocol import ChatCompletionRequest, CompletionRequest, GenerationFields
from vlm_server.response_schema import TIMINGS, RequestTimings

OpenAIRequest = TypeVar("OpenAIRequest", ChatCompletionRequest, CompletionRequest)

ModelName = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
_ANY_MODEL = "Accepted, without effect: the server has one model, and answers with its name."


class AlpacaFields(GenerationFields):
    """What both routes know."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    model: ModelName = Field("", description=_ANY_MODEL)

    def filled(self, kind: type[OpenAIRequest], **fields: Any) -> OpenAIRequest:
        """As OpenAI's request for `fields`, this API's defaults in the places of absent ones."""
        given = {name: value for name in GenerationFields.model_fields if (value := getattr(self, name)) is not None}
        return kind.model_construct(**{**self.DEFAULTS, **given, **fields})


def _text_alone(value: object) -> object:
    if isinstance(value, dict) and value.get("type") == "image_url":
        message = "not allowed: Alpaca's template is text, with no place for a picture; start the server without --compat"
        raise PydanticCustomError("api:unsupported_content_type", message)
    return value


Text = Annotated[
    Annotated[UnicodeText | None, Tag("<string>")] | Annotated[list[Annotated[TextPart, BeforeValidator(_text_alone)]], Tag("<parts>")],
    Discriminator(lambda value: "<parts>" if isinstance(value, list) else "<string>"),
]


class AlpacaMessage(BaseModel):
    """One message: a text under `message`, or as OpenAI's clients write it under `content`."""

    model_config = ConfigDict(extra="allow")

    role: UnicodeText = Field(description="system, user or assistant. Others are left out of the prompt, and come back in the answer.")
    content: Text = Field(None, description="Another name for message.")
    message: Text = Field(None, validate_default=True)

    @field_validator("message")
    @classmethod
    def _has_a_text(cls, value: object, info: ValidationInfo) -> object:
        if value is None and info.data.get("content", "") is None:
            raise PydanticCustomError("missing", "a message needs its text, here or in content")
        return one_of_two_names(value, info)

    @property
    def turn(self) -> Turn:
        given = self.message if self.content is None else self.content
        text = "".join(part.text for part in given) if isinstance(given, list) else given
        return Turn(self.role, text or "")


def _never(value: object) -> None:
    if value is not None:
        raise PydanticCustomError("api:unsupported_parameter", "not supported here, only null; a chat's texts are its messages")


class AlpacaChatRequest(AlpacaFields):
    """A conversation; the answer to its last message comes back behind all of them."""

    input_field: ClassVar[str] = "messages"
    DEFAULTS: ClassVar[Mapping[str, Any]] = CHAT_DEFAULTS

    prompt: Annotated[None, BeforeValidator(_never)] = Field(None, description="Refused: of completions alone.")
    messages: Annotated[
        Annotated[UnicodeText, Tag("<string>")] | Annotated[list[AlpacaMessage], Field(min_length=1), Tag("<list>")],
        Discriminator(lambda value: "<string>" if isinstance(value, str) else "<list>"),
    ] = Field(description="The conversation so far. A plain string is one user message.")

    @property
    def turns(self) -> list[Turn]:
        if isinstance(self.messages, str):
            return [Turn("user", self.messages)]
        return [message.turn for message in self.messages]


class AlpacaCompletionRequest(AlpacaFields):
    """An instruction, put into Alpaca's template."""

    input_field: ClassVar[str] = "prompt"
    DEFAULTS: ClassVar[Mapping[str, Any]] = COMPLETION_DEFAULTS

    prompt: UnicodeText = Field(description="What the model is to do.")


class AlpacaEmbeddingsRequest(BaseModel):
    """One text or several."""

    model_config = ConfigDict(extra="allow")

    model: ModelName = Field("", description=_ANY_MODEL)
    input: Annotated[
        Annotated[UnicodeText, Tag("<string>")] | Annotated[list[UnicodeText], Field(min_length=1, max_length=MAX_INPUTS), Tag("<list>")],
        Discriminator(lambda value: "<string>" if isinstance(value, str) else "<list>"),
    ]
    user: str | None = Field(None, description="Accepted, without effect.")


class AlpacaChatMessage(BaseModel):
    role: str
    content: str


class AlpacaChatChoice(BaseModel):
    index: int
    message: AlpacaChatMessage


class AlpacaChatResponse(BaseModel):
    """All messages of the request, then the answer: read the last choice."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[AlpacaChatChoice]
    warnings: list[str] = Field(default_factory=list, description="What of the request has no effect; absent without any.")
    timings: RequestTimings | None = TIMINGS


class AlpacaCompletionChoice(BaseModel):
    index: int
    text: str


class AlpacaCompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[AlpacaCompletionChoice]
    warnings: list[str] = Field(default_factory=list, description="What of the request has no effect; absent without any.")
    timings: RequestTimings | None = TIMINGS


class AlpacaEmbedding(BaseModel):
    object: Literal["embedding"]
    embedding: list[float] | list[list[float]] = Field(description="Of length 1; for several inputs a list of one each.")
    index: Literal[0]


class AlpacaEmbeddingsResponse(BaseModel):
    """One item, whatever the number of inputs."""

    object: Literal["list"]
    data: list[AlpacaEmbedding]
    model: str
    warnings: list[str] = Field(default_factory=list, description="What of the request has no effect; absent without any.")
