"""Every field and block that Anthropic's SDK documents is decided upon here: it works, does nothing on purpose, or is refused by name."""

import typing
from typing import Any

import pytest
from anthropic.types import (
    base64_image_source_param,
    beta,
    cache_control_ephemeral_param,
    image_block_param,
    message_count_tokens_params,
    message_create_params,
    text_block_param,
    thinking_block_param,
    tool_choice_tool_param,
    tool_param,
    tool_result_block_param,
    tool_use_block_param,
)
from pydantic import BaseModel, ValidationError

from vlm_server.anthropic import protocol
from vlm_server.field_rules import NO_OPS

IN_HEADERS = {"betas", "workspace_id"}
CREATE = message_create_params.MessageCreateParamsStreaming
BETA_CREATE = beta.message_create_params.MessageCreateParamsStreaming

DOCUMENTED: list[tuple[type, type[BaseModel]]] = [
    (CREATE, protocol.MessagesRequest),
    (BETA_CREATE, protocol.MessagesRequest),
    (message_count_tokens_params.MessageCountTokensParams, protocol.CountTokensRequest),
    (beta.message_count_tokens_params.MessageCountTokensParams, protocol.CountTokensRequest),
    (text_block_param.TextBlockParam, protocol.TextBlock),
    (image_block_param.ImageBlockParam, protocol.ImageBlock),
    (base64_image_source_param.Base64ImageSourceParam, protocol.Base64Source),
    (thinking_block_param.ThinkingBlockParam, protocol.ThinkingBlock),
    (tool_use_block_param.ToolUseBlockParam, protocol.ToolUseBlock),
    (tool_result_block_param.ToolResultBlockParam, protocol.ToolResultBlock),
    (cache_control_ephemeral_param.CacheControlEphemeralParam, protocol.CacheControl),
    (tool_param.ToolParam, protocol.CustomTool),
    (beta.BetaToolParam, protocol.CustomTool),
    (tool_choice_tool_param.ToolChoiceToolParam, protocol.ToolChoice),
    (beta.BetaThinkingConfigEnabledParam, protocol.Thinking),
    (beta.BetaOutputConfigParam, protocol.OutputConfig),
]


@pytest.mark.parametrize(("documented", "model"), DOCUMENTED, ids=lambda kind: f"{kind.__module__.split('.')[2:]}{kind.__name__}")
def test_every_documented_field_is_decided_upon(documented: Any, model: type[BaseModel]) -> None:
    names = {name for base in (documented, *documented.__orig_bases__) for name in getattr(base, "__annotations__", ())}
    declared = {field.alias or name for name, field in model.model_fields.items()}

    assert len(names) > 1
    assert names - IN_HEADERS - declared - set(protocol.RULES[model]) - (NO_OPS if "messages" in names else set()) == set()


def documented_blocks() -> list[str]:
    kinds = [kind for kind in typing.get_args(beta.BetaContentBlockParam) if hasattr(kind, "__annotations__")]
    return sorted({name for kind in kinds for name in typing.get_args(typing.get_type_hints(kind)["type"])})


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_every_documented_block_is_taken_or_refused_by_its_name(role: str) -> None:
    taken = {"user": {"text", "image", "tool_result"}, "assistant": {"text", "thinking", "redacted_thinking", "tool_use"}}
    blocks = documented_blocks()
    assert len(blocks) > 20

    for kind in blocks:
        body = {"model": "m", "max_tokens": 1, "messages": [{"role": role, "content": [{"type": kind}]}]}
        with pytest.raises(ValidationError) as caught:
            protocol.MessagesRequest.model_validate(body)
        error = caught.value.errors()[0]
        if kind in taken[role]:
            assert error["type"] == "missing", kind
        elif kind in taken["user"] | taken["assistant"]:
            assert error["type"] == "api:invalid_value", kind
        else:
            assert error["type"] == "api:unsupported_content_type", kind
            assert kind in error["msg"]
