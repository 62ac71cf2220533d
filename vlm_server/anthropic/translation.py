"""A request of Anthropic's Messages API as a chat of ours. Knows nothing of HTTP or of how chats are answered."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from vlm_server.anthropic.field_names import FieldNames
from vlm_server.anthropic.protocol import CountTokensRequest, CustomTool, MessagesRequest, OutputConfig, RedactedThinkingBlock, ToolChoice
from vlm_server.anthropic.turns import chat_messages
from vlm_server.errors import validation_error
from vlm_server.protocol import ChatCompletionRequest

_NAMES = {
    "stop": "stop_sequences",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "tool_choice.function": "tool_choice",
    "enable_thinking": "thinking",
    "chat_template_kwargs": "thinking",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


@dataclass(frozen=True, slots=True)
class Translation:
    chat: ChatCompletionRequest
    names: FieldNames


def translate(request: CountTokensRequest) -> Translation:
    """The chat that a request means. Raises ApiError 400 under the client's names for what no chat can have."""
    fields, names = chat_fields(request)
    try:
        return Translation(ChatCompletionRequest.model_validate(fields), names)
    except ValidationError as error:
        errors = [{**details, "loc": ("body", *details["loc"])} for details in error.errors()]
        raise names.in_error(validation_error(errors, is_json=True)) from error


def chat_fields(request: CountTokensRequest) -> tuple[dict[str, Any], FieldNames]:
    """The fields of the chat, and where they come from."""
    names = FieldNames(_NAMES)
    messages = chat_messages(request, names)
    fields: dict[str, Any] = {"model": request.model, "messages": messages}
    if messages[-1]["role"] == "assistant":
        fields["continue_final_message"] = True
        names["continue_final_message"] = f"messages[{len(request.messages) - 1}].content"
    fields |= _tool_fields(request.tools or [], names) | _choice_fields(request.tool_choice) | _form_fields(request.output_config)
    if request.thinking is not None:
        fields["enable_thinking"] = request.thinking.type != "disabled"
    if request.on_media_error is not None:
        fields["on_media_error"] = request.on_media_error
    if isinstance(request, MessagesRequest):
        fields |= _sampling_fields(request)
    return fields, names


def without_effect(request: CountTokensRequest) -> list[str]:
    """Warnings about what a chat cannot do for the request."""
    warnings = [
        f"messages[{index}].content[{place}]: redacted thinking cannot be read here; it is left out"
        for index, message in enumerate(request.messages)
        if not isinstance(message.content, str)
        for place, block in enumerate(message.content)
        if isinstance(block, RedactedThinkingBlock)
    ]
    if request.thinking is not None and request.thinking.budget_tokens is not None:
        warnings.append("thinking.budget_tokens: it has no effect; only max_tokens ends reasoning")
    return warnings


def _tool_fields(tools: Sequence[CustomTool], names: FieldNames) -> dict[str, Any]:
    written = []
    for index, tool in enumerate(tools):
        names[f"tools[{index}].function"] = f"tools[{index}]"
        names[f"tools[{index}].function.parameters"] = f"tools[{index}].input_schema"
        function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema, "strict": tool.strict}
        written.append({"type": "function", "function": {name: value for name, value in function.items() if value is not None}})
    return {"tools": written} if written else {}


def _choice_fields(choice: ToolChoice | None) -> dict[str, Any]:
    if choice is None:
        return {}
    named = {"type": "function", "function": {"name": choice.name}}
    fields: dict[str, Any] = {"tool_choice": named if choice.type == "tool" else _CHOICES[choice.type]}
    if choice.disable_parallel_tool_use is not None:
        fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    return fields


def _form_fields(config: OutputConfig | None) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if config is not None and config.effort is not None:
        fields["reasoning_effort"] = config.effort
    if config is not None and config.format is not None:
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": config.format.schema_}}
    return fields


def _sampling_fields(request: MessagesRequest) -> dict[str, Any]:
    fields = {
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stop": request.stop_sequences,
        "stream": request.stream,
        "return_image_sizes": request.return_image_sizes,
    }
    return {name: value for name, value in fields.items() if value is not None}
