"""What happens to a request's fields that the request models do not declare.

Three kinds: listed no-ops, accepted whatever they hold; documented fields that we do not support, refused unless null or a default
that asks for nothing; and fields that no API documents, answered with a warning, or refused with `--strict-fields`.
"""

from collections.abc import Iterator, Mapping

from pydantic import BaseModel

from vlm_server.alpaca_protocol import AlpacaChatRequest, AlpacaCompletionRequest, AlpacaEmbeddingsRequest, AlpacaMessage
from vlm_server.anthropic.protocol import RULES as _ANTHROPIC_RULES
from vlm_server.embedding_protocol import EmbeddingsRequest
from vlm_server.errors import bad_request
from vlm_server.file_protocol import ExpiresAfter, FileForm, FileListQuery
from vlm_server.format_protocol import JsonObjectFormat, JsonSchemaFormat, NamedJsonSchema, RegexFormat, StructuredOutputs, TextFormat
from vlm_server.generate_protocol import AbortRequest, GenerateReqInput
from vlm_server.interactive_protocol import GenerateRequest
from vlm_server.message_schema import CalledFunction, ChatMessage, ImagePart, ImageUrl, TextPart, ToolCall
from vlm_server.protocol import ChatCompletionRequest, CompletionRequest, StreamOptions
from vlm_server.responses.request import UNSUPPORTED as _UNSUPPORTED_IN_RESPONSES
from vlm_server.responses.request import CreateResponse
from vlm_server.token_protocol import DetokenizeRequest, EncodeRequest, PerplexityRequest, PoolingRequest, TokenizeRequest
from vlm_server.tool_schema import AllowedTools, AllowedToolsChoice, FunctionDefinition, FunctionReference, NamedTool, Tool

NO_OPS = frozenset({"kwargs", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})

# Field → the values, beside null, that ask for nothing.
_OF_PICTURES: dict[str, tuple[object, ...]] = {"on_media_error": ("fail",), "return_image_sizes": (False,)}  # where answers have none
_UNSUPPORTED_ANYWHERE: dict[str, tuple[object, ...]] = {
    "spaces_between_special_tokens": (True,),
    "repetition_ngram_size": (0,),
    "repetition_ngram_threshold": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "adapter_name": (),
    "prompt_cache_retention": (),
    "guided_json": (),  # vLLM's older names of what structured_outputs holds
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "migration_request": (),
    "with_cache": (False,),
    "preserve_cache": (False,),
    "return_logprob": (False,),
    "return_token_ids": (False,),
    "return_routed_experts": (False,),
    **_OF_PICTURES,
}
_UNSUPPORTED_IN_CHAT: dict[str, tuple[object, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "verbosity": ("medium",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
    "do_preprocess": (True,),
    "input_ids": (),
    "image_data": ([],),
    "media_io_kwargs": ({},),
}
# What the other routes have under this name, or under another one.
_UNSUPPORTED_IN_TURN: dict[str, tuple[object, ...]] = {
    "mm_processor_kwargs": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "reasoning_effort": (),
    "continue_final_message": (False,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "num_beams": (1,),
    "do_sample": (True,),
    "max_tokens": (),
    "max_completion_tokens": (),
    "min_tokens": (0,),
    "n": (1,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "stream_options": (),
    "chat_template_kwargs": ({},),
    "enable_thinking": (),
}
# What the other routes have, or SGLang's route of this name.
_UNSUPPORTED_IN_GENERATE: dict[str, tuple[object, ...]] = {
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "messages": (),
    "tools": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "text": (),
    "sampling_params": ({},),
}
# Fields of our own and of OpenAI's answers, that clients send back with the history.
_UNSUPPORTED_IN_MESSAGE: dict[str, tuple[object, ...]] = {
    "function_call": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
}
# A picture's size in the words of one family or another.
_OTHER_SIZES: dict[str, tuple[object, ...]] = {"resized_height": (), "resized_width": (), "max_dynamic_patch": ()}

# `--compat alpaca`: its reference took these and ignored them, or they belong to templates that are not its.
_UNSUPPORTED_IN_ALPACA: dict[str, tuple[object, ...]] = {
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "add_generation_prompt": (True,),
}
_ALPACA_RULES = _UNSUPPORTED_ANYWHERE | _UNSUPPORTED_IN_CHAT | _UNSUPPORTED_IN_TURN | _UNSUPPORTED_IN_ALPACA

_RULES: dict[type[BaseModel], dict[str, tuple[object, ...]]] = {
    ChatCompletionRequest: _UNSUPPORTED_ANYWHERE | _UNSUPPORTED_IN_CHAT,
    CompletionRequest: _UNSUPPORTED_ANYWHERE,
    GenerateRequest: _UNSUPPORTED_ANYWHERE | _UNSUPPORTED_IN_CHAT | _UNSUPPORTED_IN_TURN,
    ChatMessage: _UNSUPPORTED_IN_MESSAGE,
    AlpacaChatRequest: _ALPACA_RULES,
    AlpacaCompletionRequest: _ALPACA_RULES,
    AlpacaMessage: _UNSUPPORTED_IN_MESSAGE | {"name": (), "tool_calls": ([],), "tool_call_id": (), "reasoning_content": ("",)},
    AlpacaEmbeddingsRequest: {"encoding_format": ("float",), "dimensions": ()},
    **_UNSUPPORTED_IN_RESPONSES,
    CreateResponse: _UNSUPPORTED_ANYWHERE | _UNSUPPORTED_IN_RESPONSES[CreateResponse],
    EmbeddingsRequest: {"truncate_prompt_tokens": (), "normalize": (True,), "add_special_tokens": (True,), "messages": (), **_OF_PICTURES},
    EncodeRequest: {},
    PerplexityRequest: {},
    PoolingRequest: {"encoding_format": ("float",), "dimensions": ()},
    TokenizeRequest: {"return_image_sizes": (False,)},
    DetokenizeRequest: {},
    GenerateReqInput: _UNSUPPORTED_ANYWHERE | _UNSUPPORTED_IN_GENERATE,
    AbortRequest: {"finished_reason": (), "abort_message": ()},
    StreamOptions: {"include_obfuscation": (False,)},
    TextFormat: {},
    JsonObjectFormat: {},
    JsonSchemaFormat: {},
    NamedJsonSchema: {},
    RegexFormat: {},
    StructuredOutputs: {
        "disable_fallback": (False,),
        "disable_any_whitespace": (True, False),
        "disable_additional_properties": (False,),
        "whitespace_pattern": (),
        "structural_tag": (),
    },
    ImageUrl: _OTHER_SIZES,
    ImagePart: {"uuid": (), **_OTHER_SIZES},
    TextPart: {},
    FileForm: {},
    ExpiresAfter: {},
    FileListQuery: {},
    **{model: {} for model in (Tool, FunctionDefinition, NamedTool, FunctionReference, AllowedToolsChoice, AllowedTools)},
    **{model: {} for model in (ToolCall, CalledFunction)},
    **_ANTHROPIC_RULES,
}


def check_fields(request: BaseModel, *, strict: bool) -> list[str]:
    """The warnings for fields that no API documents. Raises ApiError 400 for the first field that is refused."""
    warnings = []
    for model, name, path in _undeclared(request, ""):
        value = (model.model_extra or {})[name]
        rules = _RULES[type(model)]
        if name in rules:
            _refuse_unless_no_op(path, value, rules[name])
        elif model is not request or name not in NO_OPS:
            warnings.append(f"{path}: no API documents this field; it has no effect")
    if warnings and strict:
        path = warnings[0].split(":")[0]
        raise bad_request("unknown_parameter", f"{path}: no API documents this field (--strict-fields)", param=path)
    return warnings


def _refuse_unless_no_op(path: str, value: object, no_ops: tuple[object, ...]) -> None:
    if value is None or any(value == no_op and isinstance(value, type(no_op)) for no_op in no_ops):
        return
    allowed = " or ".join(["null", *(repr(no_op) for no_op in no_ops)])
    raise bad_request("unsupported_parameter", f"{path}: not supported, only {allowed}", param=path)


def _undeclared(model: BaseModel, prefix: str) -> Iterator[tuple[BaseModel, str, str]]:
    """(model, field, path) for every undeclared field, at any depth."""
    for name in model.model_extra or {}:
        yield model, name, f"{prefix}{name}"
    for name, value in model.__dict__.items():
        yield from _undeclared_within(value, f"{prefix}{name}")


def _undeclared_within(value: object, path: str) -> Iterator[tuple[BaseModel, str, str]]:
    if isinstance(value, BaseModel):
        yield from _undeclared(value, f"{path}.")
    elif isinstance(value, list) and not isinstance(value, Mapping):
        for index, item in enumerate(value):
            if isinstance(item, BaseModel | list):
                yield from _undeclared_within(item, f"{path}[{index}]")
