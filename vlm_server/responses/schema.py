"""The shapes of what `/v1/responses` answers, for `openapi.json` alone, under OpenAI's names: what is sent is not validated again."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, RootModel

from vlm_server.format_protocol import JsonObjectFormat, TextFormat
from vlm_server.response_schema import ChatTokenLogprob
from vlm_server.responses.items import InputImageContent, InputTextContent, ReasoningText, RefusalContent, SummaryText
from vlm_server.responses.request import FunctionTool, TextFormatJsonSchema, ToolChoiceAllowed, ToolChoiceFunction

_Status = Literal["in_progress", "completed", "incomplete"]


class ResponseOutputText(BaseModel):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChatTokenLogprob] = Field(description="Empty unless they are asked for.")


class ResponseOutputMessage(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: _Status
    content: list[Annotated[ResponseOutputText | RefusalContent, Field(discriminator="type")]]


class ResponseFunctionToolCall(BaseModel):
    id: str
    type: Literal["function_call"]
    status: _Status
    call_id: str = Field(description="What the call's output is sent back with.")
    name: str
    arguments: str = Field(description="JSON text, as the model wrote it.")


class ResponseReasoningItem(BaseModel):
    id: str
    type: Literal["reasoning"]
    status: _Status
    summary: list[SummaryText]
    content: list[ReasoningText]


ResponseOutputItem = Annotated[ResponseOutputMessage | ResponseFunctionToolCall | ResponseReasoningItem, Field(discriminator="type")]


class InputTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Tokens that the prefix cache gave.")
    cache_write_tokens: int = Field(description="Not counted: 0.")
    image_tokens: int = Field(description="Tokens that stand for pictures.")


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(BaseModel):
    code: str = Field(description="server_error, rate_limit_exceeded or invalid_prompt.")
    message: str
    type: str | None = None
    param: str | None = None


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"] = Field(description="max_output_tokens or the window is full.")


class ResponseReasoning(BaseModel):
    effort: str | None
    summary: None


class ResponseTextConfig(BaseModel):
    format: Annotated[TextFormat | JsonObjectFormat | TextFormatJsonSchema, Field(discriminator="type")]
    verbosity: Literal["medium"]


class Response(BaseModel):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    completed_at: int | None
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[ResponseOutputItem]
    output_text: str = Field(description="The text of all messages of the output.")
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ResponseReasoning
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: ResponseTextConfig
    tool_choice: Literal["none", "auto", "required"] | ToolChoiceFunction | ToolChoiceAllowed
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    metadata: dict[str, str]
    warnings: list[str] = Field(default_factory=list, description="Fields of the request that have no effect; absent without any.")


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


_InputParts = list[Annotated[InputTextContent | InputImageContent, Field(discriminator="type")]]


class ResponseInputMessageItem(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["user", "system", "developer"]
    status: _Status
    content: _InputParts


class ResponseFunctionToolCallOutputItem(BaseModel):
    id: str
    type: Literal["function_call_output"]
    status: _Status
    call_id: str
    output: str | _InputParts


ResponseItem = (
    ResponseInputMessageItem | ResponseOutputMessage | ResponseFunctionToolCall | ResponseFunctionToolCallOutputItem | ResponseReasoningItem
)


class ResponseItemList(BaseModel):
    object: Literal["list"]
    data: list[ResponseItem]
    first_id: str
    last_id: str
    has_more: bool


class _Event(BaseModel):
    sequence_number: int


class ResponseCreatedEvent(_Event):
    type: Literal["response.created"]
    response: Response


class ResponseInProgressEvent(_Event):
    type: Literal["response.in_progress"]
    response: Response


class ResponseCompletedEvent(_Event):
    type: Literal["response.completed"]
    response: Response


class ResponseIncompleteEvent(_Event):
    type: Literal["response.incomplete"]
    response: Response


class ResponseFailedEvent(_Event):
    type: Literal["response.failed"]
    response: Response


class ResponseOutputItemAddedEvent(_Event):
    type: Literal["response.output_item.added"]
    output_index: int
    item: ResponseOutputItem


class ResponseOutputItemDoneEvent(_Event):
    type: Literal["response.output_item.done"]
    output_index: int
    item: ResponseOutputItem


class _ItemEvent(_Event):
    item_id: str
    output_index: int


class _PartEvent(_ItemEvent):
    content_index: int


_Part = Annotated[ResponseOutputText | ReasoningText, Field(discriminator="type")]


class ResponseContentPartAddedEvent(_PartEvent):
    type: Literal["response.content_part.added"]
    part: _Part


class ResponseContentPartDoneEvent(_PartEvent):
    type: Literal["response.content_part.done"]
    part: _Part


class ResponseTextDeltaEvent(_PartEvent):
    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[ChatTokenLogprob]


class ResponseTextDoneEvent(_PartEvent):
    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[ChatTokenLogprob]


class ResponseReasoningTextDeltaEvent(_PartEvent):
    type: Literal["response.reasoning_text.delta"]
    delta: str


class ResponseReasoningTextDoneEvent(_PartEvent):
    type: Literal["response.reasoning_text.done"]
    text: str


class ResponseFunctionCallArgumentsDeltaEvent(_ItemEvent):
    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ResponseFunctionCallArgumentsDoneEvent(_ItemEvent):
    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


class ResponseStreamEvent(
    RootModel[
        Annotated[
            ResponseCreatedEvent
            | ResponseInProgressEvent
            | ResponseCompletedEvent
            | ResponseIncompleteEvent
            | ResponseFailedEvent
            | ResponseOutputItemAddedEvent
            | ResponseOutputItemDoneEvent
            | ResponseContentPartAddedEvent
            | ResponseContentPartDoneEvent
            | ResponseTextDeltaEvent
            | ResponseTextDoneEvent
            | ResponseReasoningTextDeltaEvent
            | ResponseReasoningTextDoneEvent
            | ResponseFunctionCallArgumentsDeltaEvent
            | ResponseFunctionCallArgumentsDoneEvent,
            Field(discriminator="type"),
        ]
    ]
):
    """One event of a streamed response; the last one is completed, incomplete or failed."""
