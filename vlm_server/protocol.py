"""The requests of the OpenAI routes, with LMDeploy's extensions.

Every declared field has its effect. A documented field that is not declared here is refused by `field_rules`, as is, with
`--strict-fields`, one that no API documents. Bounds stand here and nowhere else, so that a 400 names the field.
"""

from typing import Annotated, Any, ClassVar

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

from vlm_server.format_protocol import ResponseFormat, StructuredOutputs
from vlm_server.message_schema import ChatMessage, UnicodeText

MAX_CHOICES = 128
MAX_BEAMS = 32
_MAX_INT64 = 2**63 - 1


def _stop_list(value: object) -> object:
    """None, false and an empty string mean no stop strings (clients send all three)."""
    if value is None or value is False or value == "":
        return None
    return [value] if isinstance(value, str) else value


StopStrings = Annotated[
    Annotated[list[Annotated[UnicodeText, Field(min_length=1)]], Field(max_length=64)] | None,
    BeforeValidator(_stop_list),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}),
]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")

    include_usage: bool = Field(False, description="Send the usage in a last chunk without choices.")


class GenerationFields(BaseModel):
    """What both routes know. A null field is as good as an absent one."""

    input_field: ClassVar[str]  # which one holds the prompt

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str = Field(description="One of the ids of GET /v1/models.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy. Default: the checkpoint's generation config, else 1.")
    top_p: float | None = Field(None, gt=0, le=1, description="Keep the most likely tokens that together reach this probability.")
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="Keep the k most likely tokens; 0 or -1: all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Drop tokens less likely than this share of the most likely one.")
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="Above 1: tokens of prompt and output get less likely.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="Token id to what is added to its logit."
    )
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
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = Field(None, description="Default true.")
    response_format: ResponseFormat | None = Field(None, description="Text, any JSON object, JSON by a schema, or a regular expression.")
    structured_outputs: StructuredOutputs | None = Field(None, description="The same in vLLM's words, and choices and grammars.")
    stream: bool | None = Field(None, description="Answer as server-sent events.")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted, without effect.")

    @property
    def num_choices(self) -> int:
        return self.n or 1

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
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return thinking | (self.chat_template_kwargs or {})


def _prompt_kind(value: object) -> str:
    if not isinstance(value, list):
        return "<string>"
    first = value[0] if value else None
    return {str: "<strings>", int: "<tokens>", list: "<token lists>"}.get(type(first), "<strings>")


TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class CompletionRequest(GenerationFields):
    """Text to be continued, without a chat template."""

    input_field: ClassVar[str] = "prompt"

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

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token_id for token_id in self.prompt if isinstance(token_id, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]
