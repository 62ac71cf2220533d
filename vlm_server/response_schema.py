"""The shapes of the answers, for `openapi.json` alone: what is sent is built by `shapes` and is not validated again."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from vlm_server import error_codes

# OpenAI's field, with the type that it has there: generators of clients know none that is null alone.
_ALWAYS_NULL = Field(None, description="Always null.")

WARNINGS = "Fields of the request that have no effect, and pictures that were left out; absent without any."
_UNCHECKED = Field(description="As LMDeploy sends it; nothing in it is checked.")


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Prompt tokens that the prefix cache gave.")
    image_tokens: int = Field(description="Prompt tokens that stand for pictures.")


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int = Field(description="Completion tokens that begin between the markers of the reasoning.")
    accepted_prediction_tokens: int | None = _ALWAYS_NULL
    audio_tokens: int | None = _ALWAYS_NULL
    rejected_prediction_tokens: int | None = _ALWAYS_NULL


class UsageInfo(BaseModel):
    prompt_tokens: int = Field(description="Tokens of the prompt, those of pictures included.")
    completion_tokens: int = Field(description="Tokens of all answers, their end tokens included.")
    total_tokens: int = Field(description="The sum of both.")
    prompt_tokens_details: PromptTokensDetails = Field(description="Which tokens the prompt had.")
    completion_tokens_details: CompletionTokensDetails | None = Field(
        None, description="Null where the model's reasoning is not told apart."
    )


class PictureTimings(BaseModel):
    """One picture's stages, in milliseconds; absent where they were not needed."""

    fetch_ms: float | None = Field(None, description="Downloaded, or its data: URL decoded.")
    decode_ms: float | None = Field(None, description="The file to pixels.")
    preprocess_ms: float | None = Field(None, description="Resized and tiled for the model.")


class RequestTimings(BaseModel):
    """Milliseconds by stage; stages that were not needed are absent."""

    files_ms: float | None = Field(None, description="Uploaded pictures, read from the store.")
    template_ms: float | None = Field(None, description="The chat template, rendered.")
    pictures_ms: float | None = Field(None, description="All pictures, worked on side by side.")
    tokenize_ms: float | None = Field(None, description="The text to token ids.")
    queue_ms: float | None = Field(None, description="Waiting in the engine; as the next two, of the answer that began first.")
    encode_ms: float | None = Field(None, description="Pictures in the vision encoder.")
    prefill_ms: float | None = Field(None, description="The prompt, until its first token.")
    generate_ms: float | None = Field(None, description="From the first piece of the answers to the last.")
    first_token_ms: float | None = Field(None, description="From the request's arrival to the first piece of an answer.")
    total_ms: float = Field(description="From the request's arrival to the end of its answers.")
    per_picture: list[PictureTimings] = Field(default_factory=list, description="Each picture's own stages, in the request's order.")


TIMINGS = Field(None, description="With return_timings, streamed in the last chunk; absent otherwise.")


class TopLogprob(BaseModel):
    token: str = Field(description="The token's text.")
    bytes: list[int] = Field(description="Its bytes, of which several tokens may be needed for one letter.")
    logprob: float = Field(description="The natural logarithm of its probability; -9999.0 where that is 0.")


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob] = Field(description="The likeliest tokens at this place.")


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob] = Field(description="One entry per token.")
    refusal: str | None = _ALWAYS_NULL


class FunctionOfCall(BaseModel):
    name: str = Field(description="One of the names in tools.")
    arguments: str = Field(description="JSON text, as the model wrote it.")


class MessageToolCall(BaseModel):
    id: str = Field(description="What the message with the result names in its tool_call_id.")
    type: Literal["function"]
    function: FunctionOfCall = Field(description="What is called.")


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None = Field(description="Null where there are only calls or only reasoning.")
    refusal: str | None = _ALWAYS_NULL
    reasoning_content: str | None = Field(None, description="What the model thought before it answered.")
    tool_calls: list[MessageToolCall] | None = Field(None, description="The functions to call.")


FinishReasonName = Literal["stop", "length", "abort"]  # abort: POST /abort_request ended it
ChatFinishReasonName = Literal["stop", "length", "tool_calls", "abort"]


class ChatCompletionResponseChoice(BaseModel):
    index: int
    message: AssistantMessage = Field(description="The answer.")
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReasonName


class SeenPixels(BaseModel):
    """A rectangle that the model sees: its point (x, y) is ((x + offset_x) * scale_x, (y + offset_y) * scale_y) of the original."""

    width: int = Field(description="In pixels, counted from the left, as all here.")
    height: int = Field(description="Counted from above.")
    offset_x: float = Field(description="Above 0: so much was cut off on the left. Below 0: a border was added.")
    offset_y: float = Field(description="The same above.")
    scale_x: float = Field(description="Pixels of the original for one of these.")
    scale_y: float = Field(description="The same downwards.")


class ImageSize(BaseModel):
    """One picture of the request."""

    param: str = Field(description="The picture's field, by its path in the request.")
    width: int = Field(description="Of the original, upright, in pixels.")
    height: int = Field(description="Of the original, upright, in pixels.")
    seen: SeenPixels | None = Field(description="The whole picture as the model sees it. Null where the image processor is unknown.")
    tiles: list[SeenPixels] = Field(description="What the model sees beside it: tiles or crops, in their order; empty without.")


ImageSizes = Annotated[
    list[ImageSize], Field(default_factory=list, description="With return_image_sizes: of each picture, in their order.")
]


class ChatCompletionResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatCompletionResponseChoice]
    usage: UsageInfo
    service_tier: str | None = _ALWAYS_NULL
    warnings: list[str] = Field(default_factory=list, description=WARNINGS)
    image_sizes: ImageSizes
    timings: RequestTimings | None = TIMINGS


class FunctionOfCallDelta(BaseModel):
    name: str | None = Field(None, description="In the call's first piece alone.")
    arguments: str = Field(description="What this piece adds to the JSON text.")


class ToolCallDelta(BaseModel):
    """A call's id, type and name first, then pieces of its arguments under the same index."""

    index: int = Field(description="Which of the answer's calls, from 0.")
    id: str | None = Field(None, description="In the call's first piece alone.")
    type: Literal["function"] | None = None
    function: FunctionOfCallDelta = Field(description="The piece.")


class DeltaMessage(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = Field(description="What this piece adds to the text.")
    reasoning_content: str | None = Field(None, description="What this piece adds to the reasoning.")
    tool_calls: list[ToolCallDelta] | None = Field(None, description="What this piece adds to the calls.")


class ChatCompletionResponseStreamChoice(BaseModel):
    index: int
    delta: DeltaMessage = Field(description="What this piece adds to the answer.")
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
    image_sizes: ImageSizes
    timings: RequestTimings | None = TIMINGS


class CompletionLogprobs(BaseModel):
    tokens: list[str] = Field(description="The text of each token.")
    token_logprobs: list[float | None] = Field(
        description="The natural logarithm of each one's probability; null for the first token of a prompt that is echoed."
    )
    top_logprobs: list[dict[str, float] | None] = Field(description="The likeliest tokens at each place.")
    text_offset: list[int] = Field(description="Characters of the text before each token, those of an echoed prompt included.")


class CompletionResponseChoice(BaseModel):
    index: int
    text: str = Field(description="What follows the prompt.")
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
    timings: RequestTimings | None = TIMINGS


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
    timings: RequestTimings | None = TIMINGS


class GenerateFinishReason(BaseModel):
    type: FinishReasonName


class GenerateMeta(BaseModel):
    prompt_tokens: int
    completion_tokens: int = Field(description="So far.")
    finish_reason: GenerateFinishReason | None = Field(description="Streamed, null but in the last piece.")
    output_token_logprobs: list[list[float]] | None = Field(description="Log probability and id of each of output_ids.")
    routed_experts: list[int] | None = _ALWAYS_NULL
    timings: RequestTimings | None = TIMINGS


class GenerateReqOutput(BaseModel):
    """An answer; streamed, one of its pieces, which each hold what is new."""

    text: str
    output_ids: list[int] = Field(description="All generated tokens, the end token and those of a stop string too.")
    meta_info: GenerateMeta
    warnings: list[str] = Field(default_factory=list, description=WARNINGS)
    image_sizes: ImageSizes


class ErrorDetail(BaseModel):
    message: str = Field(description="What was wrong, and what is allowed.")
    type: str = Field(description="The kind of error, as OpenAI calls it.")
    param: str | None = Field(description="The field, by its path in the request.")
    code: str = Field(description=error_codes.DESCRIPTION)


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
    warnings: list[str] = Field(default_factory=list, description=WARNINGS)
    image_sizes: ImageSizes
    timings: RequestTimings | None = TIMINGS


class ModelPermission(BaseModel):
    id: str
    object: Literal["model_permission"]
    created: int
    allow_create_engine: bool = _UNCHECKED
    allow_sampling: bool = _UNCHECKED
    allow_logprobs: bool = _UNCHECKED
    allow_search_indices: bool = _UNCHECKED
    allow_view: bool = _UNCHECKED
    allow_fine_tuning: bool = _UNCHECKED
    organization: str = _UNCHECKED
    group: str | None = _UNCHECKED
    is_blocking: bool = _UNCHECKED


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str = Field(description="This server.")
    root: str = Field(description="The folder or hub id of the checkpoint.")
    parent: str | None = _ALWAYS_NULL
    max_model_len: int | None = Field(description="Tokens of prompt and answer together.")
    permission: list[ModelPermission] = Field(description="As LMDeploy has it.")


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard] = Field(description="The models.")


class HealthResponse(BaseModel):
    status: Literal["healthy", "initializing", "unhealthy"] = Field(description="healthy: it takes requests.")
    message: str = Field(description="The engine's state in words.")


class LiveResponse(BaseModel):
    status: Literal["live"] = Field(description="The server answers.")


class ProbeStages(BaseModel):
    age_s: float = Field(description="Seconds since the probe ended.")
    stages_ms: dict[str, float] = Field(description="Milliseconds by stage, as in `Server-Timing`.")


class ReadyResponse(BaseModel):
    status: Literal["ready", "not_ready"] = Field(description="ready: it takes requests, and what it was tried with went through.")
    message: str = Field(description="Why, in words.")
    stage: str | None = Field(
        description="What is missing: draining, engine, first_probe, queue, or the probe's stage that failed: template, decode, "
        "preprocess, tokenize, encode, prefill. Null where it is ready."
    )
    probe: ProbeStages | None = Field(description="The last probe, where one has ended.")


class EngineStatus(BaseModel):
    state: str = Field(description="starting, ready, restarting, failed or closed.")
    failure: str | None = Field(description="Why it failed.")
    num_restarts: int = Field(description="Times that it was started again.")
    silence_s: float = Field(description="Seconds since it told its numbers.")
    info: dict[str, Any] | None = Field(description="What it settled on at its start. Null before.")


class StageTotalResponse(BaseModel):
    num: int = Field(description="Requests that went through the stage; tokens, of the stage decode.")
    time_s: float = Field(description="Seconds in the stage, in sum.")


class StatusSample(BaseModel):
    at_s: float = Field(description="Seconds since the server was started.")
    engine: dict[str, Any] | None = Field(description="The engine's gauges and counters. Null where it did not answer.")
    vision: dict[str, Any] = Field(description="Those of the pictures' stages before the engine.")
    stages: dict[str, StageTotalResponse] = Field(description="The engine's stages: queue, encode, prefill and decode.")


class StatusResponse(BaseModel):
    model: str = Field(description="The model's id.")
    version: str = Field(description="The server's.")
    started_at: int = Field(description="Unix time of the server's start.")
    uptime_s: float = Field(description="Seconds since the server was started.")
    readiness: ReadyResponse = Field(description="As `GET /health/ready` answers.")
    engine: EngineStatus = Field(description="The engine's process.")
    num_turns: int = Field(description="Turns of interactive sessions under way.")
    limits: dict[str, int] = Field(description="What the gauges can come to.")
    sample: StatusSample = Field(description="The numbers of this moment.")
    history: list[StatusSample] = Field(description="Earlier ones, the oldest first, if asked for.")


class IsSleepingResponse(BaseModel):
    is_sleeping: bool = Field(description="Always false.")


class ErrorResponse(BaseModel):
    """OpenAI's `error` object; beside it the same as flat keys, where `code` is the HTTP status."""

    error: ErrorDetail = Field(description="As OpenAI writes it.")
    message: str = Field(description="As in error.")
    type: str = Field(description="As in error.")
    param: str | None = Field(description="As in error.")
    code: int = Field(description="The HTTP status.")
    object: Literal["error"]


class ValidationError(BaseModel):
    """One thing that is wrong with the shape of a body."""

    loc: list[str | int] = Field(description="The way to the field: `body`, then names and indices.")
    msg: str = Field(description="What was wrong, or what is allowed.")
    type: str = Field(description="The kind of error, as pydantic calls it.")


class HTTPValidationError(ErrorResponse):
    """An ErrorResponse; where the shape of the body is wrong, with all that is wrong with it."""

    detail: list[ValidationError] | None = Field(None, description="The first 32 errors; absent where the body has the right shape.")


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Of length 1; with encoding_format base64 as text.")


class EmbeddingsUsage(BaseModel):
    prompt_tokens: int = Field(description="Tokens of all inputs, those of pictures included.")
    total_tokens: int = Field(description="The same.")


class EmbeddingsResponse(BaseModel):
    object: Literal["list"]
    data: list[Embedding] = Field(description="One per input, in their order.")
    model: str
    usage: EmbeddingsUsage
    warnings: list[str] = Field(default_factory=list)


class TokenizeResponse(BaseModel):
    count: int = Field(description="How many tokens.")
    max_model_len: int = Field(description="The window: tokens of prompt and answer together.")
    tokens: list[int] = Field(description="Their ids.")
    token_strs: list[str] | None = Field(None, description="The text of each, with return_token_strs.")
    warnings: list[str] = Field(default_factory=list)


class PerplexityResponse(BaseModel):
    ppl: float = Field(description="The mean negative log-probability of a token, in nats.")
    warnings: list[str] = Field(default_factory=list)


class DetokenizeResponse(BaseModel):
    prompt: str = Field(description="The text.")
    warnings: list[str] = Field(default_factory=list)


class EncodeResponse(BaseModel):
    input_ids: list[int] | list[list[int]] = Field(description="Of one text its ids, of several a list of each.")
    length: int | list[int] = Field(description="How many ids; of several texts of each.")
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
