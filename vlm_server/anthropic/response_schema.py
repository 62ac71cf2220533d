"""The shapes of Anthropic's answers, for `openapi.json` alone: what is sent is built by `shapes` and `models`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from vlm_server import error_codes
from vlm_server.response_schema import TIMINGS, WARNINGS, ImageSizes, RequestTimings


class TextContent(BaseModel):
    type: Literal["text"]
    text: str


class ThinkingContent(BaseModel):
    type: Literal["thinking"]
    thinking: str = Field(description="Empty with thinking.display omitted.")
    signature: str = Field(description="Not checked when it comes back.")


class ToolUseContent(BaseModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any] = Field(description='{"INVALID_JSON": text} where the model wrote no whole object.')


ContentOfMessage = Annotated[TextContent | ThinkingContent | ToolUseContent, Field(discriminator="type")]
StopReasonName = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class MessageTokensDetails(BaseModel):
    thinking_tokens: int


class DeltaUsage(BaseModel):
    input_tokens: int = Field(description="Tokens of the prompt that were not in the prefix cache.")
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: int = Field(description="Tokens of the prompt that the prefix cache gave.")
    output_tokens: int
    output_tokens_details: MessageTokensDetails | None = Field(description="Null where the model's reasoning is not told apart.")


class MessageUsage(DeltaUsage):
    service_tier: Literal["standard"]


class StopFields(BaseModel):
    stop_reason: StopReasonName | None = Field(description="Null only in message_start. max_tokens also for an answer that was aborted.")
    stop_sequence: str | None = Field(description="Which of the request's stop_sequences ended the answer.")
    stop_details: None = None


class MessageResponse(StopFields):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentOfMessage]
    usage: MessageUsage
    warnings: list[str] = Field(default_factory=list, description=WARNINGS)
    image_sizes: ImageSizes
    timings: RequestTimings | None = TIMINGS


class MessageStreamEvent(BaseModel):
    """One event of a streamed message; its line `event:` repeats the type."""

    type: Literal[
        "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop", "error"
    ]
    message: MessageResponse | None = Field(None, description="Of message_start: without content.")
    index: int | None = Field(None, description="Of content_block_…: which block.")
    content_block: ContentOfMessage | None = Field(None, description="Of content_block_start: empty.")
    delta: dict[str, Any] | None = Field(
        None, description="text_delta, thinking_delta, signature_delta or input_json_delta; of message_delta the stop fields."
    )
    usage: DeltaUsage | None = Field(None, description="Of message_delta: of the whole answer.")
    image_sizes: ImageSizes
    timings: RequestTimings | None = Field(None, description="Of message_delta, with return_timings.")


class TokenCount(BaseModel):
    input_tokens: int
    warnings: list[str] = Field(default_factory=list)


class ModelInfo(BaseModel):
    id: str
    type: Literal["model"]
    display_name: str
    created_at: str = Field(description="When this server was started.")
    lifecycle: Literal["active"]
    max_input_tokens: int | None
    max_tokens: int | None


class ModelInfoList(BaseModel):
    data: list[ModelInfo]
    has_more: Literal[False]
    first_id: str
    last_id: str


class ErrorDetails(BaseModel):
    error_code: str = Field(description=error_codes.DESCRIPTION)
    param: str | None = Field(description="The field's path in the request.")


class ErrorOfMessages(BaseModel):
    type: str
    message: str
    details: ErrorDetails


class AnthropicErrorResponse(BaseModel):
    type: Literal["error"]
    error: ErrorOfMessages
    request_id: str | None
