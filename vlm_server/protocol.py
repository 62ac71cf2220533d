"""The requests of the OpenAI routes, with LMDeploy's extensions.

Every declared field has its effect. A documented field that is not declared here is refused by `field_rules`, as is, with
`--strict-fields`, one that no API documents. Bounds stand here and nowhere else, so that a 400 names the field.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import PydanticCustomError

from vlm_server.config import MAX_CHOICES, MAX_STOP_STRINGS
from vlm_server.format_protocol import ResponseFormat, StructuredOutputs, TextFormat
from vlm_server.image_protocol import OnMediaError, ProcessorSettings, ReturnImageSizes
from vlm_server.message_schema import ChatMessage, TextPart, UnicodeText, check_ending
from vlm_server.nesting import MAX_DEPTH, is_too_deep
from vlm_server.tool_schema import NamedTool, Tool, ToolChoice, Tools, forces_a_call, may_be_called, names_in

MAX_BEAMS = 32
MAX_LOGIT_BIASES = 1024
RETURN_TIMINGS = "Say in timings how many milliseconds each stage took, beside the usage; streamed, in the last chunk."
_MAX_INT64 = 2**63 - 1


def _stop_list(value: object) -> object:
    """None, false and an empty string mean no stop strings (clients send all three)."""
    if value is None or value is False or value == "":
        return None
    return [value] if isinstance(value, str) else value


StopStrings = Annotated[
    Annotated[list[Annotated[UnicodeText, Field(min_length=1)]], Field(max_length=MAX_STOP_STRINGS)] | None,
    BeforeValidator(_stop_list),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}),
]
LogitBias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_LOGIT_BIASES)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")

    include_usage: bool = Field(False, description="Send the usage in a last chunk without choices.")


class GenerationFields(BaseModel):
    """What both routes know. A null field is as good as an absent one."""

    input_field: ClassVar[str]  # which one holds the prompt
    default_max_tokens: ClassVar[int | None] = None  # None: to the end of the window
    continues_prompt: ClassVar[bool] = False  # the answer's text goes on where the prompt's ends

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str = Field(description="One of the ids of GET /v1/models.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy. Default: the checkpoint's generation config, else 1.")
    top_p: float | None = Field(None, gt=0, le=1, description="Keep the most likely tokens that together reach this probability.")
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="Keep the k most likely tokens; 0 or -1: all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Drop tokens less likely than this share of the most likely one.")
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="Above 1: tokens of prompt and output get less likely.")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="Above 0: tokens that the output has already get less likely.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="The same, once for each time that the output has them.")
    logit_bias: LogitBias | None = Field(None, description="Token id to what is added to its logit.")
    seed: int | None = Field(
        None, ge=-_MAX_INT64 - 1, le=_MAX_INT64, description="The same request with the same seed gives the same answer."
    )
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="New tokens at most.")
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="As max_tokens, and wins over it.")
    min_tokens: int | None = Field(None, ge=0, lt=2**31, description="No end before as many new tokens.")
    min_new_tokens: int | None = Field(None, ge=0, lt=2**31, description="Another name for min_tokens.")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="How many answers. With a seed, answer i has seed + i.")
    do_sample: bool | None = Field(None, description="False: greedy, or with num_beams the best beam, whatever the other fields say.")
    num_beams: int | None = Field(
        None,
        ge=1,
        le=MAX_BEAMS,
        description="Beam search, sampled where temperature, top_p, top_k or min_p are given; sent when it is done.",
    )
    stop: StopStrings = Field(None, description="End before any of these strings, of any length.")
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=1024)] | None = Field(
        None, description="End at these tokens."
    )
    ignore_eos: bool | None = Field(None, description="Go on to max_tokens: end tokens cannot be chosen.")
    include_stop_str_in_output: bool | None = Field(None, description="Leave the stop string that was met in the text.")
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out of the text; default true.")
    response_format: ResponseFormat | None = Field(None, description="Text, any JSON object, JSON by a schema, or a regular expression.")
    structured_outputs: StructuredOutputs | None = Field(None, description="The same in vLLM's words, and choices and grammars.")
    stream: bool | None = Field(None, description="Answer as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="What a stream holds beside the answer.")
    session_id: int | None = Field(
        None, ge=-_MAX_INT64 - 1, le=_MAX_INT64, description="The number by which POST /abort_request ends this request; -1: none."
    )
    return_timings: bool | None = Field(None, description=RETURN_TIMINGS)
    user: str | None = Field(None, description="Accepted, without effect.")

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def num_candidates(self) -> int:
        """How many answers are generated to each prompt."""
        return self.num_choices

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are wanted beside each new one's own log-probability; None: not even that."""
        return None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """As `num_logprobs`, of the prompt's tokens."""
        return None

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @field_validator("num_beams")
    @classmethod
    def _one_choice(cls, value: int | None, info: ValidationInfo) -> int | None:
        if (value or 1) > 1 and (info.data.get("n") or 1) > 1:
            raise PydanticCustomError("api:invalid_value", "only 1 is allowed with n above 1")
        return value

    @field_validator("min_new_tokens")
    @classmethod
    def _one_minimum(cls, value: int | None, info: ValidationInfo) -> int | None:
        if None not in (value, info.data.get("min_tokens")) and value != info.data["min_tokens"]:
            raise PydanticCustomError("api:invalid_value", "another name of min_tokens; give one of the two")
        return value


# What the renderer of templates takes for itself.
_NOT_FOR_CLIENTS = frozenset(
    {
        *("self", "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("tokenizer_kwargs", "processor_kwargs"),
    }
)


def _are_variables(value: dict[str, Any] | None) -> dict[str, Any] | None:
    for name in value or {}:
        if not name.isidentifier() or name in _NOT_FOR_CLIENTS:
            raise PydanticCustomError("api:invalid_value", "{name} is no variable of a chat template", {"name": repr(name)})
    if is_too_deep(value):
        raise PydanticCustomError("api:invalid_value", "nested in more than {limit} levels", {"limit": MAX_DEPTH})
    return value


TemplateVariables = Annotated[dict[str, Any] | None, AfterValidator(_are_variables)]


def _messages_kind(value: object) -> str:
    return "<string>" if isinstance(value, str) else "<list>"


class ChatCompletionRequest(GenerationFields):
    """A conversation to be continued by one assistant message."""

    input_field: ClassVar[str] = "messages"

    messages: Annotated[
        Annotated[UnicodeText, Tag("<string>")] | Annotated[list[ChatMessage], Field(min_length=1), Tag("<list>")],
        Discriminator(_messages_kind),
    ] = Field(description="The conversation so far. A plain string is completed as it is, without the chat template.")
    logprobs: bool | None = Field(None, description="Return the log probability of each token.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="With logprobs: as many of the likeliest tokens at each place.")
    chat_template_kwargs: TemplateVariables = Field(None, description="Variables for the chat template, e.g. enable_thinking.")
    enable_thinking: bool | None = Field(None, description="Short for chat_template_kwargs.enable_thinking, which wins.")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="Short for chat_template_kwargs.reasoning_effort, which wins."
    )
    mm_processor_kwargs: ProcessorSettings | None = Field(None, description="Settings of the model's image processor, for all pictures.")
    on_media_error: OnMediaError = None
    return_image_sizes: ReturnImageSizes = None
    tools: Tools = Field(None, description="Functions that the model may call.")
    tool_choice: ToolChoice | None = Field(
        None, description="auto (default), none, required, one function, or OpenAI's allowed_tools: some of them."
    )
    parallel_tool_calls: bool | None = Field(None, description="false: the answer ends after its first call.")
    add_generation_prompt: bool | None = Field(None, description="false: without the beginning of an answer behind the messages.")
    continue_final_message: bool | None = Field(None, description="Go on with the last message, the assistant's, in place of a new one.")

    @field_validator("mm_processor_kwargs")
    @classmethod
    def _need_pictures(cls, value: ProcessorSettings | None, info: ValidationInfo) -> ProcessorSettings | None:
        if value and value.as_dict() and isinstance(info.data.get("messages"), str):
            raise PydanticCustomError("api:invalid_value", "not with messages as a plain string, which has no pictures")
        return value

    @field_validator("tools")
    @classmethod
    def _need_messages(cls, value: list[Tool] | None, info: ValidationInfo) -> list[Tool] | None:
        if value and isinstance(info.data.get("messages"), str):
            raise PydanticCustomError("api:invalid_value", "not with messages as a plain string: tools are written by the chat template")
        return value or None

    @field_validator("tool_choice")
    @classmethod
    def _chooses_a_tool(cls, value: ToolChoice | None, info: ValidationInfo) -> ToolChoice | None:
        if "tools" not in info.data:  # refused already
            return value
        offered = {tool.function.name for tool in info.data["tools"] or ()}
        missing = [name for name in names_in(value) or () if name not in offered]
        if missing or (forces_a_call(value) and not offered):
            message = "{name} is not among the tools" if missing else "only with tools"
            raise PydanticCustomError("api:invalid_value", message, {"name": missing[0]} if missing else {})
        return value

    @field_validator("continue_final_message")
    @classmethod
    def _has_an_ending(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        messages = info.data.get("messages")
        if value and isinstance(messages, str):
            raise PydanticCustomError("api:invalid_value", "a plain string is always continued; only for a list of messages")
        if messages:
            check_ending(messages, adds_prompt=info.data.get("add_generation_prompt"), continues=value)
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise PydanticCustomError("api:invalid_value", "only with logprobs: true")
        return value

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def template_kwargs(self) -> dict[str, Any]:
        short = {"enable_thinking": self.enable_thinking, "reasoning_effort": self.reasoning_effort}
        return {name: value for name, value in short.items() if value is not None} | (self.chat_template_kwargs or {})

    def image_settings(self) -> dict[str, Any] | None:
        return self.mm_processor_kwargs.as_dict() if self.mm_processor_kwargs else None

    def callable_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        return may_be_called(self.tools or [], self.tool_choice)

    @property
    def must_call(self) -> bool:
        return forces_a_call(self.tool_choice)

    @property
    def has_fixed_form(self) -> bool:
        """Whether an answer without calls has to follow a grammar."""
        return not isinstance(self.response_format, TextFormat | None) or self.structured_outputs is not None

    @property
    def names_one_tool(self) -> bool:
        return isinstance(self.tool_choice, NamedTool)

    def continued_text(self) -> str:
        """The text of the message that the answer continues; empty without one."""
        if not self.continue_final_message or isinstance(self.messages, str):
            return ""
        content = self.messages[-1].content
        if isinstance(content, list):
            return "".join(part.text for part in content if isinstance(part, TextPart))
        return content or ""

    @property
    def adds_generation_prompt(self) -> bool:
        return self.add_generation_prompt is not False and not self.continue_final_message


def _prompt_kind(value: object) -> str:
    if not isinstance(value, list):
        return "<string>"
    first = value[0] if value else None
    return {str: "<strings>", int: "<tokens>", list: "<token lists>"}.get(type(first), "<strings>")


TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class CompletionRequest(GenerationFields):
    """Text to be continued, without a chat template."""

    input_field: ClassVar[str] = "prompt"
    default_max_tokens: ClassVar[int | None] = 16  # OpenAI's, and LMDeploy's until 0.9
    continues_prompt: ClassVar[bool] = True

    prompt: Annotated[
        Annotated[UnicodeText, Tag("<string>")]
        | Annotated[list[UnicodeText], Field(min_length=1, max_length=1024), Tag("<strings>")]
        | Annotated[TokenIds, Tag("<tokens>")]
        | Annotated[list[TokenIds], Field(max_length=1024), Tag("<token lists>")],
        Discriminator(_prompt_kind),
    ] = Field(description="A string, several strings, token ids, or several lists of token ids.")
    logprobs: Annotated[int | None, BeforeValidator(lambda value: None if value is False else value)] = Field(
        None, ge=0, le=20, description="Return log probabilities, with as many of the likeliest tokens at each place."
    )
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description="New tokens at most; 0, with echo: the prompt alone. Default: 16.")
    echo: bool | None = Field(None, description="Begin with the prompt's text; with logprobs, also those of its tokens.")

    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_CHOICES,
        description="Generate as many answers, and return the n with the highest mean log-probability of a token.",
    )

    @field_validator("best_of")
    @classmethod
    def _can_choose(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is None or value == 1 == (info.data.get("n") or 1):
            return value
        if value < (info.data.get("n") or 1):
            raise PydanticCustomError("api:invalid_value", "at least n")
        if info.data.get("stream"):
            raise PydanticCustomError("api:invalid_value", "only 1 is allowed with stream: the best answers are known when all have ended")
        if (info.data.get("num_beams") or 1) > 1:
            raise PydanticCustomError("api:invalid_value", "only 1 is allowed with num_beams above 1")
        return value

    suffix: UnicodeText | None = Field(
        None, description="Fill in the text between the prompt and this, with models whose tokenizer has tokens for it."
    )

    @property
    def num_candidates(self) -> int:
        return self.best_of or self.num_choices

    @property
    def num_logprobs(self) -> int | None:
        return 0 if self.logprobs is None and self.num_candidates > self.num_choices else self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.echo else None

    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token_id for token_id in self.prompt if isinstance(token_id, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]
