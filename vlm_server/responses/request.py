"""The request of `POST /v1/responses`, with LMDeploy's extensions.

Every declared field has its effect or says that it has none. What is not declared is refused by `UNSUPPORTED`, which `field_rules` reads,
or warned about. Fields that chats have too have the chats' bounds.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from vlm_server.format_protocol import JsonObjectFormat, JsonSchema, StructuredOutputs, TextFormat
from vlm_server.image_protocol import OnMediaError, ReturnImageSizes
from vlm_server.message_schema import UnicodeText
from vlm_server.nesting import MAX_DEPTH, is_too_deep
from vlm_server.protocol import ChatCompletionRequest, LogitBias, StopStrings, TemplateVariables
from vlm_server.responses.items import (
    FunctionCallOutput,
    FunctionToolCall,
    InputImageContent,
    InputItems,
    InputTextContent,
    Message,
    OutputTextContent,
    ReasoningItem,
    ReasoningText,
    RefusalContent,
    SummaryText,
    kind_of,
    told_apart_by_type,
)
from vlm_server.tool_schema import MAX_TOOLS, FunctionName

LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (LOGPROBS, "message.input_image.image_url")


def _as_in_chats(name: str) -> Any:
    """The bounds and the description of a chat's field of that name."""
    return ChatCompletionRequest.model_fields[name]


class FunctionTool(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    name: FunctionName = Field(description="What the model calls it by.")
    description: UnicodeText | None = Field(None, description="What it does, for the model.")
    parameters: dict[str, Any] | None = Field(None, description="The JSON schema of the arguments, an object. Default: no arguments.")
    strict: bool | None = Field(None, description="The arguments must follow the schema. Default false, also where OpenAI's is true.")


def _is_function(value: object) -> object:
    kind = value.get("type") if isinstance(value, dict) else "function"
    if kind != "function":
        name = repr(kind)[:60] if isinstance(kind, str) else "these"
        message = "tools of the type {name} are not supported, only functions"
        raise PydanticCustomError("api:unsupported_tool", message, {"name": name})
    return value


class ToolChoiceFunction(BaseModel):
    """The one function that must be called."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    name: FunctionName = Field(description="One of the tools'.")


class ToolChoiceAllowed(BaseModel):
    """Some of the tools."""

    model_config = ConfigDict(extra="allow")

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"] = Field(description="Whether one of them must be called.")
    tools: list[Annotated[ToolChoiceFunction, BeforeValidator(_is_function)]] = Field(
        min_length=1, max_length=MAX_TOOLS, description="Those that may be called."
    )


def _choice_kind(value: object) -> str:
    if isinstance(value, dict | BaseModel):
        kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        return "<allowed_tools>" if kind == "allowed_tools" else "<function>"
    return "<string>"


_ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<string>")]
    | Annotated[ToolChoiceFunction, Tag("<function>")]
    | Annotated[ToolChoiceAllowed, Tag("<allowed_tools>")],
    Discriminator(_choice_kind),
]


def _is_text(schema: JsonSchema) -> JsonSchema:
    """Refuses what could not be given back in the response."""
    if is_too_deep(schema):
        raise PydanticCustomError("api:invalid_value", "nested in more than {limit} levels", {"limit": MAX_DEPTH})
    try:
        json.dumps(schema, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("api:invalid_value", "not Unicode text: half of a surrogate pair") from None
    return schema


class TextFormatJsonSchema(BaseModel):
    """JSON by a schema. Answers are on one line and their properties in the schema's order."""

    model_config = ConfigDict(extra="allow", serialize_by_alias=True)

    type: Literal["json_schema"]
    name: UnicodeText | None = Field(None, description="For the reader; it has no effect.")
    description: UnicodeText | None = Field(None, description="For the reader; it has no effect.")
    schema_: Annotated[JsonSchema, AfterValidator(_is_text)] = Field(
        alias="schema", description="The schema. One that cannot be followed is refused with the reason."
    )
    strict: bool | None = Field(None, description="Answers follow the schema in any case.")


_Format = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[TextFormatJsonSchema, Tag("<json_schema>")],
    Discriminator(kind_of, custom_error_type="api:invalid_value", custom_error_message="its type must be text, json_object or json_schema"),
    told_apart_by_type(text=TextFormat, json_object=JsonObjectFormat, json_schema=TextFormatJsonSchema),
]


class TextConfig(BaseModel):
    """What the answer's text must look like."""

    model_config = ConfigDict(extra="allow")

    format: _Format | None = Field(None, description="Text, any JSON object, or JSON by a schema.")
    verbosity: Literal["medium"] | None = Field(None, description="Accepted, without effect; others are not supported.")


class ReasoningConfig(BaseModel):
    model_config = ConfigDict(extra="allow")

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="The chat template's variable reasoning_effort."
    )
    summary: Literal["auto"] | None = Field(None, description="Without effect: no summary is made, the reasoning itself is given.")


class ResponsesStreamOptions(BaseModel):
    """None has an effect."""

    model_config = ConfigDict(extra="allow")


def _is_metadata(value: dict[str, str] | None) -> dict[str, str] | None:
    pairs = value or {}
    if len(pairs) > 16 or any(len(name) > 64 or len(text) > 512 for name, text in pairs.items()):
        raise PydanticCustomError("api:invalid_value", "at most 16 pairs, names of at most 64 characters, texts of at most 512")
    return value


class CreateResponse(BaseModel):
    """A conversation to be continued. A null field is as good as an absent one."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: UnicodeText | None = Field(None, description="One of the ids of GET /v1/models; may be left out.")
    input: Annotated[
        Annotated[UnicodeText, Tag("<string>")] | Annotated[InputItems, Tag("<items>")],
        Discriminator(lambda value: "<items>" if isinstance(value, list) else "<string>"),
    ] = Field(description="What is said now: the user's text, or items.")
    instructions: UnicodeText | None = Field(None, description="A system text before everything, for this response alone.")
    previous_response_id: UnicodeText | None = Field(None, description="Go on with that response's conversation.")
    store: bool | None = Field(None, description="Keep the response for retrieval and continuation. Default true.")
    metadata: Annotated[dict[UnicodeText, UnicodeText] | None, AfterValidator(_is_metadata)] = Field(
        None, description="Up to 16 pairs of texts, kept and given back."
    )
    stream: bool | None = Field(None, description="Answer as server-sent events.")
    stream_options: ResponsesStreamOptions | None = Field(None, description="Nothing that has an effect.")
    include: Annotated[list[str], Field(max_length=16)] | None = Field(
        None, description=f"{LOGPROBS}: the log probability of each token of a message. Addresses of pictures are always given."
    )
    top_logprobs: int | None = Field(None, ge=0, le=20, description="With log probabilities: as many of the likeliest tokens.")
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31, description="New tokens at most, those of the reasoning included.")
    tools: Annotated[list[Annotated[FunctionTool, BeforeValidator(_is_function)]], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: _ToolChoice | None = Field(None, description="auto (default), none, required, one function, or some of the tools.")
    parallel_tool_calls: bool | None = Field(None, description="false: the answer ends after its first call.")
    max_tool_calls: int | None = Field(None, ge=1, description="Without effect: it counts calls of built-in tools, and there are none.")
    text: TextConfig | None = Field(None, description="What the answer's text must look like.")
    reasoning: ReasoningConfig | None = Field(None, description="How much the model reasons.")
    truncation: Literal["disabled"] | None = Field(None, description="A conversation that is too long for the model is refused.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="Accepted, without effect.")
    user: UnicodeText | None = Field(None, description="Accepted, without effect.")
    safety_identifier: UnicodeText | None = Field(None, description="Accepted, without effect.")
    prompt_cache_key: UnicodeText | None = Field(None, description="Accepted, without effect: the prefix cache is always used.")

    temperature: float | None = _as_in_chats("temperature")
    top_p: float | None = _as_in_chats("top_p")
    top_k: int | None = _as_in_chats("top_k")
    min_p: float | None = _as_in_chats("min_p")
    repetition_penalty: float | None = _as_in_chats("repetition_penalty")
    presence_penalty: float | None = _as_in_chats("presence_penalty")
    frequency_penalty: float | None = _as_in_chats("frequency_penalty")
    logit_bias: LogitBias | None = _as_in_chats("logit_bias")
    seed: int | None = _as_in_chats("seed")
    min_tokens: int | None = _as_in_chats("min_tokens")
    do_sample: bool | None = _as_in_chats("do_sample")
    stop: StopStrings = _as_in_chats("stop")
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=1024)] | None = _as_in_chats("stop_token_ids")
    ignore_eos: bool | None = _as_in_chats("ignore_eos")
    include_stop_str_in_output: bool | None = _as_in_chats("include_stop_str_in_output")
    skip_special_tokens: bool | None = _as_in_chats("skip_special_tokens")
    return_timings: bool | None = _as_in_chats("return_timings")
    structured_outputs: StructuredOutputs | None = _as_in_chats("structured_outputs")
    chat_template_kwargs: TemplateVariables = _as_in_chats("chat_template_kwargs")
    enable_thinking: bool | None = _as_in_chats("enable_thinking")
    on_media_error: OnMediaError = None
    return_image_sizes: ReturnImageSizes = None

    @field_validator("include")
    @classmethod
    def _can_be_included(cls, value: list[str] | None) -> list[str] | None:
        for name in value or ():
            if name not in INCLUDABLE:
                message = "{name} is not supported, only {allowed}"
                raise PydanticCustomError(
                    "api:unsupported_parameter", message, {"name": repr(name)[:80], "allowed": " and ".join(INCLUDABLE)}
                )
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and "include" in info.data and LOGPROBS not in (info.data["include"] or ()):
            raise PydanticCustomError("api:invalid_value", 'only with include: ["{name}"]', {"name": LOGPROBS})
        return value

    @property
    def has_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def is_stored(self) -> bool:
        return self.store is not False


# What chats have under the same name.
SAME_AS_IN_CHATS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "seed"),
    *("min_tokens", "do_sample", "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens"),
    *("structured_outputs", "chat_template_kwargs", "enable_thinking", "parallel_tool_calls"),
    *("on_media_error", "return_image_sizes"),
)

_PROMPT_CACHE_MARK: dict[str, tuple[object, ...]] = {"prompt_cache_breakpoint": ()}
_OF_ANOTHER_CALLER: dict[str, tuple[object, ...]] = {"namespace": (), "caller": (), "created_by": ()}

# Field → the values, beside null, that ask for nothing.
UNSUPPORTED: dict[type[BaseModel], dict[str, tuple[object, ...]]] = {
    CreateResponse: {
        "background": (False,),
        "conversation": (),
        "prompt": (),
        "context_management": ([],),
        "moderation": (),
        "access_programs": (),
        "image": (),
        "prompt_cache_options": ({},),
        "prompt_cache_retention": (),
        "max_tokens": (),  # what chats have in place of max_output_tokens, messages, text, reasoning
        "max_completion_tokens": (),
        "messages": (),
        "response_format": (),
        "reasoning_effort": (),
        "logprobs": (False,),
        "n": (1,),
        "num_beams": (1,),
    },
    ResponsesStreamOptions: {"include_obfuscation": (False,), "include_usage": (True,)},
    TextConfig: {},
    TextFormatJsonSchema: {},
    ReasoningConfig: {"generate_summary": (), "context": ("auto",), "mode": ("standard",)},
    FunctionTool: {"allowed_callers": (["direct"],), "async": (False,), "defer_loading": (False,), "output_schema": ()},
    ToolChoiceFunction: {},
    ToolChoiceAllowed: {},
    Message: {"phase": ()},
    FunctionToolCall: {"async": (False,), **_OF_ANOTHER_CALLER},
    FunctionCallOutput: {"name": (), **_OF_ANOTHER_CALLER},
    ReasoningItem: {"encrypted_content": ()},
    ReasoningText: {},
    SummaryText: {},
    InputTextContent: _PROMPT_CACHE_MARK,
    InputImageContent: _PROMPT_CACHE_MARK,
    OutputTextContent: {},
    RefusalContent: {},
}
