"""The requests of the routes that turn text into tokens and back. `model` may be left out: a server has one."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from vlm_server.image_protocol import OnMediaError, ProcessorSettings
from vlm_server.message_schema import ChatMessage, UnicodeText, check_ending
from vlm_server.protocol import TemplateVariables, TokenIds
from vlm_server.tool_schema import Tools


class TokenRequest(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, description="One of the ids of GET /v1/models.")


class EncodeRequest(TokenRequest):
    """LMDeploy's."""

    input: Annotated[
        Annotated[UnicodeText, Tag("<string>")] | Annotated[list[UnicodeText], Field(max_length=1024), Tag("<strings>")],
        Discriminator(lambda value: "<strings>" if isinstance(value, list) else "<string>"),
    ] = Field(description="A text, or several.")
    do_preprocess: bool = Field(False, description="Encode the chat of which the text is the only user message.")
    add_bos: bool = Field(True, description="Begin with the token that begins a text, where the model has one.")


class TokenizeRequest(TokenRequest):
    """Either a text, as a completion takes it, or messages, as a chat takes them."""

    prompt: UnicodeText | None = Field(None, description="A text.")
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = Field(
        None, validate_default=True, description="A conversation. Its pictures are measured by their headers and not decoded."
    )
    add_special_tokens: bool = Field(True, description="Of a prompt: with the tokens that begin or end a text.")
    add_generation_prompt: bool = Field(True, description="Of messages: with the beginning of the answer.")
    continue_final_message: bool = Field(False, description="Of messages: without the end of the last one, the assistant's.")
    chat_template_kwargs: TemplateVariables = Field(None, description="Of messages: variables for the chat template.")
    tools: Tools = Field(None, description="Of messages: functions that the model may call.")
    mm_processor_kwargs: ProcessorSettings | None = Field(None, description="Of messages: settings for all pictures.")
    on_media_error: OnMediaError = None
    return_token_strs: bool = Field(False, description="Return each token's text, too.")

    @field_validator("messages")
    @classmethod
    def _one_of_two(cls, value: list[ChatMessage] | None, info: ValidationInfo) -> list[ChatMessage] | None:
        if (value is None) == (info.data.get("prompt") is None):
            raise PydanticCustomError("api:invalid_value", "give either prompt or messages")
        return value

    @field_validator("continue_final_message")
    @classmethod
    def _has_an_ending(cls, value: bool, info: ValidationInfo) -> bool:
        if info.data.get("messages"):
            check_ending(info.data["messages"], adds_prompt=None, continues=value)
        return value

    @property
    def adds_generation_prompt(self) -> bool:
        return self.add_generation_prompt and not self.continue_final_message


class DetokenizeRequest(TokenRequest):
    tokens: TokenIds = Field(description="Token ids.")
    skip_special_tokens: bool = Field(False, description="Leave special tokens out of the text.")


class PerplexityRequest(TokenRequest):
    input: Annotated[
        Annotated[UnicodeText, Tag("<string>")] | Annotated[TokenIds, Tag("<tokens>")],
        Discriminator(lambda value: "<tokens>" if isinstance(value, list) else "<string>"),
    ] = Field(description="A text, or its token ids: at least 2.")


_TEXTS, _IDS = ({"type": "array", "items": {"type": kind}} for kind in ("string", "integer"))
_AnyInput = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "null"}]})]  # every one is refused


class PoolingRequest(TokenRequest):
    input: _AnyInput = Field(None, description="Texts or token ids.")
