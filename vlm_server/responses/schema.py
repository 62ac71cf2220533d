"""The shapes of what `/v1/responses` answers, for `openapi.json` alone, under OpenAI's names: what is sent is not validated again."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, RootModel

from vlm_server.format_protocol import JsonObjectFormat, TextFormat
from vlm_server.response_schema import TIMINGS, WARNINGS, ChatTokenLogprob, ImageSizes, RequestTimings
from vlm_server.responses.items import InputImageContent, InputTextContent, ReasoningText, RefusalContent, SummaryText
from vlm_server.responses.request import FunctionTool, TextFormatJsonSchema, ToolChoiceAllowed, ToolChoiceFunction

_Status = Annotated[
    Literal["in_progress", "completed", "incomplete"], Field(description="incomplete: the answer was cut in it; in_progress: in events.")
]
_OutputText = Annotated[str, Field(description="The text.")]
_Arguments = Annotated[str, Field(description="JSON text, as the model wrote it.")]
_CallId = Annotated[str, Field(description="What the call's output is sent back with.")]
_FunctionName = Annotated[str, Field(description="The function's.")]
_Logprobs = Annotated[list[ChatTokenLogprob], Field(description="Empty unless they are asked for.")]


class ResponseOutputText(BaseModel):
    type: Literal["output_text"]
    text: _OutputText
    annotations: list[dict[str, Any]] = Field(description="None are made.")
    logprobs: _Logprobs


class ResponseOutputMessage(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: _Status
    content: list[Annotated[ResponseOutputText | RefusalContent, Field(discriminator="type")]] = Field(
        description="The answer's text; a refusal only where a client sent one."
    )


class ResponseFunctionToolCall(BaseModel):
    id: str
    type: Literal["function_call"]
    status: _Status
    call_id: _CallId
    name: _FunctionName
    arguments: _Arguments


class ResponseReasoningItem(BaseModel):
    id: str
    type: Literal["reasoning"]
    status: _Status
    summary: list[SummaryText] = Field(description="Empty unless a client sent one.")
    content: list[ReasoningText] = Field(description="The reasoning itself.")


ResponseOutputItem = Annotated[ResponseOutputMessage | ResponseFunctionToolCall | ResponseReasoningItem, Field(discriminator="type")]


class InputTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Tokens that the prefix cache gave.")
    cache_write_tokens: int = Field(description="Not counted: 0.")
    image_tokens: int = Field(description="Tokens that stand for pictures.")


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int = Field(description="Tokens that begin between the markers of the reasoning.")


class ResponseUsage(BaseModel):
    input_tokens: int = Field(description="Tokens of the whole conversation, those of pictures included.")
    input_tokens_details: InputTokensDetails = Field(description="Some of them.")
    output_tokens: int = Field(description="Tokens of the answer.")
    output_tokens_details: OutputTokensDetails = Field(description="Some of them.")
    total_tokens: int = Field(description="Both together.")


class ResponseError(BaseModel):
    code: str = Field(description="server_error, rate_limit_exceeded or invalid_prompt.")
    message: str = Field(description="What went wrong.")
    type: str | None = Field(None, description="The server's own code for it.")
    param: str | None = Field(None, description="The field of the request.")


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"] = Field(description="max_output_tokens or the window is full.")


class ResponseReasoning(BaseModel):
    effort: str | None = Field(description="As in the request.")
    summary: str | None = Field(description="Always null: none is made.")


class ResponseTextConfig(BaseModel):
    format: Annotated[TextFormat | JsonObjectFormat | TextFormatJsonSchema, Field(discriminator="type")] = Field(
        description="What the text must look like."
    )
    verbosity: Literal["medium"] = Field(description="Always medium.")


_AS_ASKED = "As in the request."


class Response(BaseModel):
    id: str
    object: Literal["response"]
    created_at: int = Field(description="When it was begun, in seconds since 1970.")
    status: Literal["in_progress", "completed", "incomplete", "cancelled", "failed"] = Field(
        description="in_progress and failed: in events alone. cancelled: by POST /abort_request."
    )
    background: Literal[False] = Field(description="Always false.")
    completed_at: int | None = Field(description="When it was completed, in seconds since 1970.")
    error: ResponseError | None = Field(description="Of a failed response.")
    incomplete_details: IncompleteDetails | None = Field(description="Of an incomplete response.")
    instructions: str | None = Field(description=_AS_ASKED)
    max_output_tokens: int | None = Field(description=_AS_ASKED)
    max_tool_calls: int | None = Field(description=_AS_ASKED)
    model: str
    output: list[ResponseOutputItem] = Field(description="The answer: what the model thought, said and called, in its order.")
    output_text: str = Field(description="The text of all messages of the output.")
    parallel_tool_calls: bool = Field(description=_AS_ASKED)
    previous_response_id: str | None = Field(description=_AS_ASKED)
    prompt_cache_key: str | None = Field(description=_AS_ASKED)
    reasoning: ResponseReasoning = Field(description=_AS_ASKED)
    safety_identifier: str | None = Field(description=_AS_ASKED)
    service_tier: Literal["default"] = Field(description="Always default.")
    store: bool = Field(description="Whether it is kept.")
    temperature: float = Field(description="As in the request, or the checkpoint's.")
    text: ResponseTextConfig = Field(description=_AS_ASKED)
    tool_choice: Literal["none", "auto", "required"] | ToolChoiceFunction | ToolChoiceAllowed = Field(description=_AS_ASKED)
    tools: list[FunctionTool] = Field(description=_AS_ASKED)
    top_logprobs: int = Field(description=_AS_ASKED)
    top_p: float = Field(description="As in the request, or the checkpoint's.")
    truncation: Literal["disabled"] = Field(description="Always disabled.")
    usage: ResponseUsage | None
    user: str | None = Field(description=_AS_ASKED)
    metadata: dict[str, str] = Field(description=_AS_ASKED)
    warnings: list[str] = Field(default_factory=list, description=WARNINGS)
    image_sizes: ImageSizes
    timings: RequestTimings | None = TIMINGS


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"]
    deleted: Literal[True] = Field(description="Always true.")


_InputParts = list[Annotated[InputTextContent | InputImageContent, Field(discriminator="type")]]


class ResponseInputMessageItem(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["user", "system", "developer"]
    status: _Status
    content: _InputParts = Field(description="Texts and pictures.")


class ResponseFunctionToolCallOutputItem(BaseModel):
    id: str
    type: Literal["function_call_output"]
    status: _Status
    call_id: _CallId
    output: str | _InputParts = Field(description="What the function gave.")


ResponseItem = (
    ResponseInputMessageItem | ResponseOutputMessage | ResponseFunctionToolCall | ResponseFunctionToolCallOutputItem | ResponseReasoningItem
)


class ResponseItemList(BaseModel):
    object: Literal["list"]
    data: list[ResponseItem] = Field(description="One page of the items.")
    first_id: str = Field(description="The page's first item; empty without one.")
    last_id: str = Field(description="The page's last item, after which the next page comes.")
    has_more: bool = Field(description="Whether there is a next page.")


class _Event(BaseModel):
    sequence_number: int = Field(description="The event's place in the stream, from 0.")


class _WholeEvent(_Event):
    response: Response = Field(description="The response so far.")


class ResponseCreatedEvent(_WholeEvent):
    type: Literal["response.created"]


class ResponseInProgressEvent(_WholeEvent):
    type: Literal["response.in_progress"]


class ResponseCompletedEvent(_WholeEvent):
    type: Literal["response.completed"]


class ResponseIncompleteEvent(_WholeEvent):
    type: Literal["response.incomplete"]


class ResponseFailedEvent(_WholeEvent):
    type: Literal["response.failed"]


class _OutputEvent(_Event):
    output_index: int = Field(description="The item's place in the output.")


class ResponseOutputItemAddedEvent(_OutputEvent):
    type: Literal["response.output_item.added"]
    item: ResponseOutputItem = Field(description="The item, without its text.")


class ResponseOutputItemDoneEvent(_OutputEvent):
    type: Literal["response.output_item.done"]
    item: ResponseOutputItem = Field(description="The whole item.")


class _ItemEvent(_OutputEvent):
    item_id: str = Field(description="The item's id.")


class _PartEvent(_ItemEvent):
    content_index: int = Field(description="The part's place in the item.")


_Part = Annotated[ResponseOutputText | ReasoningText, Field(discriminator="type")]
_Delta = Annotated[str, Field(description="What is added.")]


class ResponseContentPartAddedEvent(_PartEvent):
    type: Literal["response.content_part.added"]
    part: _Part = Field(description="The part, without its text.")


class ResponseContentPartDoneEvent(_PartEvent):
    type: Literal["response.content_part.done"]
    part: _Part = Field(description="The whole part.")


class ResponseTextDeltaEvent(_PartEvent):
    type: Literal["response.output_text.delta"]
    delta: _Delta
    logprobs: _Logprobs


class ResponseTextDoneEvent(_PartEvent):
    type: Literal["response.output_text.done"]
    text: _OutputText
    logprobs: _Logprobs


class ResponseReasoningTextDeltaEvent(_PartEvent):
    type: Literal["response.reasoning_text.delta"]
    delta: _Delta


class ResponseReasoningTextDoneEvent(_PartEvent):
    type: Literal["response.reasoning_text.done"]
    text: _OutputText


class ResponseFunctionCallArgumentsDeltaEvent(_ItemEvent):
    type: Literal["response.function_call_arguments.delta"]
    delta: _Delta


class ResponseFunctionCallArgumentsDoneEvent(_ItemEvent):
    type: Literal["response.function_call_arguments.done"]
    name: _FunctionName
    arguments: _Arguments


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
