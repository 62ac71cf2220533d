"""The requests of Anthropic's Messages API.

Shape and bounds in the client's own terms, so that a 400 names its fields. What the values mean for a chat is `translation`'s to say.
`RULES` says which documented fields are refused; `field_rules` does it. Names that begin with < are tags of unions.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from vlm_server.config import MAX_STOP_STRINGS
from vlm_server.image_protocol import OnMediaError, ReturnImageSizes
from vlm_server.message_schema import UnicodeText
from vlm_server.nesting import MAX_DEPTH, is_too_deep
from vlm_server.protocol import RETURN_TIMINGS
from vlm_server.tool_schema import MAX_TOOLS, FunctionName

_OTHER_BLOCKS = frozenset(
    {
        *("document", "search_result", "container_upload", "browser_state", "compaction", "fallback"),
        *("tool_reference", "tool_addition", "tool_removal", "mcp_tool_listing"),
    }
)
_OTHER_ENDINGS = ("_tool_result", "server_tool_use", "mcp_tool_use")  # of the names of blocks that tools of Anthropic's own servers make
_ROLES = ("user", "assistant", "system")


def _no_deeper(value: dict[str, Any]) -> dict[str, Any]:
    if is_too_deep(value):
        raise PydanticCustomError("api:invalid_value", "nested in more than {limit} levels", {"limit": MAX_DEPTH})
    return value


class _Fields(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class CacheControl(_Fields):
    """Accepted, without effect: every prompt is cached as far as it was seen before."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class _Block(_Fields):
    cache_control: CacheControl | None = Field(None, description="Accepted, without effect: the prefix cache is automatic.")


class TextBlock(_Block):
    type: Literal["text"]
    text: UnicodeText


def _kind(value: object) -> str:
    return f"<{value.get('type') if isinstance(value, dict) else getattr(value, 'type', None)}>"


def _known(*kinds: str, noun: str = "block") -> BeforeValidator:
    """Refuses objects of all other types, Anthropic's blocks by name."""

    def check(value: object) -> object:
        if not isinstance(value, dict):
            raise PydanticCustomError("api:invalid_value", "a {noun} is an object with a type", {"noun": noun})
        kind, names = value.get("type"), {"allowed": ", ".join(kinds), "noun": noun}
        if isinstance(kind, str) and (kind in _OTHER_BLOCKS or kind.endswith(_OTHER_ENDINGS)):
            message = "{kind} blocks are not supported here, only {allowed}"
            raise PydanticCustomError("api:unsupported_content_type", message, {"kind": kind, **names})
        if kind not in kinds:
            raise PydanticCustomError("api:invalid_value", "the {noun}'s type must be one of {allowed}", names)
        return value

    return BeforeValidator(check)


class Base64Source(_Fields):
    type: Literal["base64"]
    media_type: Annotated[str, Field(pattern=r"^image/[a-z0-9.+-]{1,64}$")]
    data: UnicodeText


class UrlSource(_Fields):
    type: Literal["url"]
    url: UnicodeText


class FileSource(_Fields):
    type: Literal["file"]
    file_id: UnicodeText


Source = Annotated[
    Annotated[Base64Source, Tag("<base64>")] | Annotated[UrlSource, Tag("<url>")] | Annotated[FileSource, Tag("<file>")],
    Discriminator(_kind),
    _known("base64", "url", "file", noun="source"),
]


class ImageBlock(_Block):
    type: Literal["image"]
    source: Source


class ThinkingBlock(_Fields):
    """What the model thought in an earlier turn."""

    type: Literal["thinking"]
    thinking: UnicodeText
    signature: str | None = Field(None, description="Accepted and not checked.")


class RedactedThinkingBlock(_Fields):
    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(_Block):
    type: Literal["tool_use"]
    id: Annotated[UnicodeText, Field(min_length=1)]
    name: Annotated[UnicodeText, Field(min_length=1)]
    input: Annotated[dict[str, Any], AfterValidator(_no_deeper)]


def _list_or_string(value: object) -> str:
    return "<blocks>" if isinstance(value, list) else "<string>"


_Text = Annotated[UnicodeText, Tag("<string>")]
_TextOrNone = Annotated[UnicodeText | None, Tag("<string>")]

TextBlocks = Annotated[list[Annotated[TextBlock, _known("text")]], Tag("<blocks>")]

ResultBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")] | Annotated[ImageBlock, Tag("<image>")], Discriminator(_kind), _known("text", "image")
]


class ToolResultBlock(_Block):
    type: Literal["tool_result"]
    tool_use_id: Annotated[UnicodeText, Field(min_length=1)]
    content: Annotated[_TextOrNone | Annotated[list[ResultBlock], Tag("<blocks>")], Discriminator(_list_or_string)] = None
    is_error: bool | None = Field(None, description="The model reads the result behind the word Error.")


UserBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")] | Annotated[ImageBlock, Tag("<image>")] | Annotated[ToolResultBlock, Tag("<tool_result>")],
    Discriminator(_kind),
    _known("text", "image", "tool_result"),
]

AssistantBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")],
    Discriminator(_kind),
    _known("text", "thinking", "redacted_thinking", "tool_use"),
]


class UserMessage(_Fields):
    role: Literal["user"]
    content: Annotated[_Text | Annotated[list[UserBlock], Tag("<blocks>")], Discriminator(_list_or_string)]


class AssistantTurn(_Fields):
    role: Literal["assistant"]
    content: Annotated[_Text | Annotated[list[AssistantBlock], Tag("<blocks>")], Discriminator(_list_or_string)]


class SystemMessage(_Fields):
    role: Literal["system"]
    content: Annotated[_Text | TextBlocks, Discriminator(_list_or_string)]


def _known_role(value: object) -> object:
    role = value.get("role") if isinstance(value, dict) else None
    if isinstance(value, dict) and "role" in value and role not in _ROLES:
        raise PydanticCustomError("api:invalid_value", "the role must be one of user, assistant, system")
    return value


def _role(value: object) -> str:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return f"<{role}>" if role in _ROLES else "<user>"


Message = Annotated[
    Annotated[UserMessage, Tag("<user>")] | Annotated[AssistantTurn, Tag("<assistant>")] | Annotated[SystemMessage, Tag("<system>")],
    Discriminator(_role),
    BeforeValidator(_known_role),
]


def _client_tool(value: object) -> object:
    if value not in (None, "custom"):
        raise PydanticCustomError("api:unsupported_tool", "{kind} tools are not supported, only custom ones", {"kind": repr(value)})
    return value


class CustomTool(_Block):
    """A function that the model may call."""

    type: Annotated[Literal["custom"] | None, BeforeValidator(_client_tool)] = None  # first: other kinds have other fields
    name: FunctionName
    description: UnicodeText | None = None
    input_schema: dict[str, Any] = Field(description="The JSON schema of the input, an object.")
    strict: bool | None = Field(None, description="The input must follow the schema.")
    eager_input_streaming: bool | None = Field(None, description="true: the input is streamed as it is written, whole JSON or not.")


class ToolChoice(_Fields):
    type: Literal["auto", "any", "tool", "none"]
    name: UnicodeText | None = Field(None, description="With type tool: which one.")
    disable_parallel_tool_use: bool | None = Field(None, description="true: the answer ends after its first call.")

    @field_validator("name")
    @classmethod
    def _of_one_tool(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("type", "tool") != "tool":
            raise PydanticCustomError("api:invalid_value", "only with the type tool")
        return value


class Thinking(_Fields):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="Not enforced: only max_tokens ends reasoning.")
    display: Literal["summarized", "omitted"] | None = Field(None, description="omitted: thinking blocks come without their text.")


class JsonFormat(_Fields):
    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(_Fields):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(None, description="Goes to the chat template.")
    format: JsonFormat | None = Field(None, description="The answer follows this JSON schema.")


class CountTokensRequest(_Fields):
    """A conversation whose tokens are counted."""

    model: str = Field(description="One of the ids of GET /v1/models.")
    messages: list[Message] = Field(min_length=1, description="The conversation. A last message of the assistant is continued.")
    system: Annotated[_TextOrNone | TextBlocks, Discriminator(_list_or_string)] = None
    tools: Annotated[list[CustomTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = Field(None, description="Sets the chat template's enable_thinking.")
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = Field(None, description="Accepted, without effect: the prefix cache is automatic.")
    on_media_error: OnMediaError = None


def _no_thread(value: object) -> object:
    """The code is Anthropic's: its SDK, whose tool runner asks for threads by itself, then sends the whole conversation without one."""
    if value is not None:
        raise PydanticCustomError("api:thread_unsupported_request", "not supported; send the whole conversation without it")
    return value


class MessagesRequest(CountTokensRequest):
    """A conversation to be continued by one message of the assistant."""

    max_tokens: int = Field(ge=1, lt=2**31, description="New tokens at most.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy. Default: the checkpoint's generation config, else 1.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    stop_sequences: Annotated[list[Annotated[UnicodeText, Field(min_length=1)]], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = Field(None, description="Answer as server-sent events.")
    return_image_sizes: ReturnImageSizes = None
    metadata: dict[str, Any] | None = Field(None, description="Accepted, without effect.")
    service_tier: Literal["auto", "standard_only"] | None = Field(None, description="Accepted, without effect: there is one tier.")
    return_timings: bool | None = Field(None, description=RETURN_TIMINGS)
    thread: Annotated[None, BeforeValidator(_no_thread)] = Field(None, description="Not supported.")


Values = tuple[object, ...]

_OF_REQUESTS: dict[str, Values] = {
    "billing_policy": (),
    "compaction": (),
    "container": (),
    "context_management": (),
    "diagnostics": ({"previous_message_id": None},),
    "fallback_credit_token": (),
    "fallbacks": ([],),
    "inference_geo": (),
    "mcp_servers": ([],),
    "output_format": (),
    "speed": ("standard",),
    "user_profile_id": (),
}
_OF_LMDEPLOY: dict[str, Values] = {
    "input_ids": (),
    "image_data": ([],),
    "return_routed_experts": (False,),
    "return_token_ids": (False,),
    "return_logprob": (False,),
    "include_stop_str_in_output": (False,),
}

# Documented fields that are not supported, with the values, beside null, that ask for nothing.
RULES: dict[type[BaseModel], dict[str, Values]] = {
    CountTokensRequest: _OF_REQUESTS,
    MessagesRequest: _OF_REQUESTS | _OF_LMDEPLOY,
    TextBlock: {"citations": ([],)},
    ImageBlock: {"transformations": ({}, {"oversized_image": "downsize"})},
    ToolUseBlock: {"caller": ({"type": "direct"},), "toolset_name": ()},
    ToolResultBlock: {"toolset_name": ()},
    CustomTool: {"allowed_callers": (["direct"],), "defer_loading": (False,), "input_examples": ([],)},
    **{model: {} for model in (CacheControl, Base64Source, UrlSource, FileSource, ThinkingBlock, RedactedThinkingBlock)},
    Thinking: {"block_binding": ()},
    OutputConfig: {"task_budget": ()},
    **{model: {} for model in (UserMessage, AssistantTurn, SystemMessage, ToolChoice, JsonFormat)},
}
