"""The shapes of the answers, for `openapi.json` alone: what is sent is built by `shapes` and is not validated again."""

from typing import Literal

from pydantic import BaseModel, Field


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Prompt tokens that the prefix cache gave.")
    image_tokens: int = Field(description="Prompt tokens that stand for pictures.")


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int = Field(description="Completion tokens that begin between the markers of the reasoning.")
    accepted_prediction_tokens: None = None
    audio_tokens: None = None
    rejected_prediction_tokens: None = None


class UsageInfo(BaseModel):
    prompt_tokens: int = Field(description="Tokens of the prompt, those of pictures included.")
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = Field(
        None, description="Null where the model's reasoning is not told apart."
    )


class TopLogprob(BaseModel):
    token: str
    bytes: list[int]
    logprob: float


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class FunctionOfCall(BaseModel):
    name: str
    arguments: str = Field(description="JSON text, as the model wrote it.")


class MessageToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: FunctionOfCall


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None = Field(description="Null where there are only calls or only reasoning.")
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[MessageToolCall] | None = None


FinishReasonName = Literal["stop", "length", "abort"]  # abort: POST /abort_request ended it
ChatFinishReasonName = Literal["stop", "length", "tool_calls", "abort"]


class ChatCompletionResponseChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReasonName


class ChatCompletionResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatCompletionResponseChoice]
    usage: UsageInfo
    service_tier: str | None = None
    warnings: list[str] = Field(default_factory=list, description="Fields of the request that have no effect; absent without any.")


class FunctionOfCallDelta(BaseModel):
    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """A call's id, type and name first, then pieces of its arguments under the same index."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionOfCallDelta


class DeltaMessage(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatCompletionResponseStreamChoice(BaseModel):
    index: int
    delta: DeltaMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReasonName | None


class ChatCompletionStreamResponse(BaseModel):
    """One event of a streamed chat completion; after the last one comes `data: [DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatCompletionResponseStreamChoice]
    usage: UsageInfo | None
    warnings: list[str] = Field(default_factory=list)


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="Null for the first token of a prompt that is echoed.")
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Characters of the text before each token, those of an echoed prompt included.")


class CompletionResponseChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReasonName


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionResponseChoice]
    usage: UsageInfo
    warnings: list[str] = Field(default_factory=list)


class CompletionResponseStreamChoice(CompletionResponseChoice):
    finish_reason: FinishReasonName | None  # type: ignore[assignment]


class CompletionStreamResponse(BaseModel):
    """One event of a streamed text completion; after the last one comes `data: [DONE]`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionResponseStreamChoice]
    usage: UsageInfo | None
    warnings: list[str] = Field(default_factory=list)


class GenerateFinishReason(BaseModel):
    type: FinishReasonName


class GenerateMeta(BaseModel):
    prompt_tokens: int
    completion_tokens: int = Field(description="So far.")
    finish_reason: GenerateFinishReason | None = Field(description="Streamed, null but in the last piece.")
    output_token_logprobs: list[tuple[float, int]] | None = Field(description="Log probability and id of each of output_ids.")
    routed_experts: None = None


class GenerateResponse(BaseModel):
    """An answer; streamed, one of its pieces, which each hold what is new."""

    text: str
    output_ids: list[int] = Field(description="All generated tokens, the end token and those of a stop string too.")
    meta_info: GenerateMeta
    warnings: list[str] = Field(default_factory=list, description="Fields of the request that have no effect; absent without any.")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str = Field(description="A stable string.")


class InteractiveResponse(BaseModel):
    """The answer to one turn; streamed, one of its pieces."""

    text: str = Field(description="The answer; streamed, what this piece adds to it.")
    tokens: int = Field(description="Tokens of the answer so far, its end token included.")
    input_tokens: int = Field(description="Tokens that this turn adds to the prompt, those of its pictures included.")
    history_tokens: int = Field(description="Tokens of earlier turns that the prompt begins with.")
    finish_reason: Literal["stop", "length", "abort", "error"] | None = Field(
        description="length: the window or request_output_len is full; abort: the turn was cancelled. Streamed, null but in the last piece."
    )
    error: ErrorDetail | None = Field(None, description="With finish_reason error, which only a stream has; absent otherwise.")
    warnings: list[str] = Field(default_factory=list, description="Fields of the request that have no effect; absent without any.")


class ModelPermission(BaseModel):
    id: str
    object: Literal["model_permission"]
    created: int
    allow_create_engine: bool
    allow_sampling: bool
    allow_logprobs: bool
    allow_search_indices: bool
    allow_view: bool
    allow_fine_tuning: bool
    organization: str
    group: str | None
    is_blocking: bool


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str = Field(description="The folder or hub id of the checkpoint.")
    parent: str | None
    max_model_len: int | None = Field(description="Tokens of prompt and answer together.")
    permission: list[ModelPermission]


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class HealthResponse(BaseModel):
    status: Literal["healthy", "initializing", "unhealthy"]
    message: str


class IsSleepingResponse(BaseModel):
    is_sleeping: bool


class ErrorResponse(BaseModel):
    """OpenAI's `error` object; beside it the same as flat keys, where `code` is the HTTP status."""

    error: ErrorDetail
    message: str
    type: str
    param: str | None
    code: int
    object: Literal["error"]


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Of length 1; with encoding_format base64 as text.")


class EmbeddingsUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
    warnings: list[str] = Field(default_factory=list)


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int = Field(description="The window: tokens of prompt and answer together.")
    tokens: list[int]
    token_strs: list[str] | None = None
    warnings: list[str] = Field(default_factory=list)


class PerplexityResponse(BaseModel):
    ppl: float = Field(description="The mean negative log-probability of a token, in nats.")
    warnings: list[str] = Field(default_factory=list)


class DetokenizeResponse(BaseModel):
    prompt: str
    warnings: list[str] = Field(default_factory=list)


class EncodeResponse(BaseModel):
    input_ids: list[int] | list[list[int]] = Field(description="Of one text its ids, of several a list of each.")
    length: int | list[int]
    warnings: list[str] = Field(default_factory=list)


class FileResponse(BaseModel):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int = Field(description="Unix time from which on the file is gone.")
    filename: str
    purpose: str
    status: Literal["processed"]
    warnings: list[str] = Field(default_factory=list)


class FileListResponse(BaseModel):
    object: Literal["list"]
    data: list[FileResponse]
    first_id: str | None
    last_id: str | None
    has_more: bool
    warnings: list[str] = Field(default_factory=list)


class FileDeletedResponse(BaseModel):
    id: str
    object: Literal["file"]
    deleted: bool
