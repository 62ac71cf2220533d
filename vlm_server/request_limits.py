"""What one request may hold and ask for, checked before any work is done for it, on all routes alike.

A request becomes a few figures (messages, pictures, answers, stop strings, schemas, texts), each held against its limit. What a field may
hold by itself stands in the request models; bytes and pixels of pictures are the vision package's to count, where they arrive.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from vlm_server.alpaca_protocol import AlpacaChatRequest
from vlm_server.config import RequestLimits
from vlm_server.embedding_protocol import EmbeddingsRequest
from vlm_server.errors import ApiError, bad_request
from vlm_server.format_protocol import JsonSchemaFormat, RegexFormat, StructuredOutputs
from vlm_server.generate_protocol import GenerateReqInput
from vlm_server.interactive_protocol import GenerateRequest
from vlm_server.message_schema import ChatMessage, ImagePart, TextPart
from vlm_server.protocol import ChatCompletionRequest, CompletionRequest, GenerationFields
from vlm_server.token_protocol import EncodeRequest, PerplexityRequest, TokenizeRequest

MAX_SENT_SCHEMA_CHARACTERS = 16 << 20  # to the engine, with which each answer is a request of its own
MAX_STOP_TOKEN_IDS_OF_BEAMS = 8  # each step of a search looks at num_beams² more continuations for each of them
Field = tuple[str, Any]  # a field's path in the request, and what it holds


def check_limits(body: BaseModel, limits: RequestLimits) -> None:
    """Raises ApiError 400, which names the field, for the first limit that the request is over."""
    _check_messages(*_messages(body), limits)
    _check_pictures(_pictures(body), limits)
    _check_texts(body, limits)
    _check_stop_strings(_declared(body, "stop") or (), limits)
    if isinstance(body, GenerationFields):
        _check_answers(body, limits)
        _check_beams(body)
        _check_schemas(body, limits)
    _check_tools(_declared(body, "tools") or (), limits)


def check_conversation(messages: Sequence[Mapping[str, Any]], limits: RequestLimits, *, param: str) -> None:
    """As `check_limits`, of messages and their pictures with those that the server kept. param: the field by which these were named."""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    num_pictures = sum(part["type"] == "image_url" for part in parts)
    _check_messages(param, messages, limits)
    if num_pictures > limits.max_pictures:
        raise _too_many_pictures(param, limits)


def _declared(body: BaseModel, name: str) -> Any:
    """What a field holds; None where the model does not declare it, though a client may have sent one of that name."""
    return getattr(body, name) if name in type(body).model_fields else None


def _messages(body: BaseModel) -> tuple[str, Sequence[object]]:
    """The list of messages and its field."""
    for name in ("messages", "prompt"):
        given = _declared(body, name)
        if isinstance(given, list) and given and isinstance(given[0], BaseModel):
            return name, given
    return "messages", ()


def _check_messages(field: str, messages: Sequence[object], limits: RequestLimits) -> None:
    if len(messages) > limits.max_messages:
        message = f"{field}: {len(messages)} messages; at most {limits.max_messages} are allowed (--max-messages)"
        raise bad_request("too_many_messages", message, param=field)


def _pictures(body: BaseModel) -> Iterator[str]:
    """The field of every picture."""
    match body:
        case GenerateReqInput():
            yield from body.picture_fields()
        case GenerateRequest():
            yield from (path for _, _, path in body.picture_fields())
        case EmbeddingsRequest():
            for path, item in body.items():
                parts = item if isinstance(item, list) else []
                yield from (f"{path}[{index}].image_url" for index, part in enumerate(parts) if _is_picture(part))
        case _:
            for path, part in _parts(body):
                if isinstance(part, ImagePart):
                    yield f"{path}.image_url"


def _is_picture(part: object) -> bool:
    return isinstance(part, dict) and part["type"] == "image_url"


def _parts(body: BaseModel) -> Iterator[Field]:
    """Every part of every message."""
    name, messages = _messages(body)
    for number, message in enumerate(messages):
        content = getattr(message, "content", None)
        for index, part in enumerate(content if isinstance(content, list) else ()):
            yield f"{name}[{number}].content[{index}]", part


def _check_pictures(fields: Iterator[str], limits: RequestLimits) -> None:
    for number, field in enumerate(fields, 1):
        if number > limits.max_pictures:
            raise _too_many_pictures(field, limits)


def _too_many_pictures(field: str, limits: RequestLimits) -> ApiError:
    message = f"{field}: at most {limits.max_pictures} pictures are allowed in a request (--max-pictures)"
    return bad_request("too_many_images", message, param=field)


def _check_texts(body: BaseModel, limits: RequestLimits) -> None:
    for field, num_characters in _texts(body):
        if num_characters > limits.max_prompt_characters:
            message = f"{field}: {num_characters} characters; at most {limits.max_prompt_characters} are allowed (--max-prompt-characters)"
            raise bad_request("prompt_too_long", message, param=field)


def _texts(body: BaseModel) -> Iterator[tuple[str, int]]:
    """Field and number of characters of each text that will be tokenized."""
    match body:
        case CompletionRequest():
            yield from _lengths("prompt", body.prompt)
            yield from _lengths("suffix", body.suffix)
        case EncodeRequest():  # all together: no waiting room bounds how many such requests there are
            yield "input", len(body.input) if isinstance(body.input, str) else sum(map(len, body.input))
        case EmbeddingsRequest() | PerplexityRequest():
            yield from _lengths("input", body.input)
        case ChatCompletionRequest() | AlpacaChatRequest() | GenerateReqInput() | GenerateRequest() | TokenizeRequest():
            name, messages = _messages(body)
            yield name, sum(map(_num_characters, messages))
            for name in ("prompt", "messages"):
                yield from _lengths(name, _declared(body, name))


def _lengths(field: str, given: object) -> Iterator[tuple[str, int]]:
    """Of a text, or of each text in a list; what is a list of parts counts as one text."""
    if isinstance(given, str):
        yield field, len(given)
        return
    items = given if isinstance(given, list) and not _are_token_ids(given) else []
    yield field, sum(len(part.text) for part in items if isinstance(part, TextPart))
    for index, item in enumerate(items):
        if isinstance(item, str | list):
            yield from _lengths(f"{field}[{index}]", item)


def _are_token_ids(given: list[Any]) -> bool:
    """By the first one: there may be millions."""
    return bool(given) and isinstance(given[0], int)


def _num_characters(message: object) -> int:
    """Of what the chat template writes of a message."""
    content = getattr(message, "content", None) or getattr(message, "message", None) or ""
    texts = [content] if isinstance(content, str) else [part.text for part in content if isinstance(part, TextPart)]
    if isinstance(message, ChatMessage):
        texts += [message.reasoning_content or "", *(call.function.arguments for call in message.tool_calls or ())]
    return sum(map(len, texts))


def _check_stop_strings(stop: Sequence[str], limits: RequestLimits) -> None:
    if len(stop) > limits.max_stop_strings:
        message = f"stop: {len(stop)} strings; at most {limits.max_stop_strings} are allowed (--max-stop-strings)"
        raise bad_request("invalid_value", message, param="stop")
    num_characters = sum(map(len, stop))
    if num_characters > limits.max_stop_characters:
        allowed = f"at most {limits.max_stop_characters} are allowed (--max-stop-characters)"
        raise bad_request("invalid_value", f"stop: {num_characters} characters in all strings together; {allowed}", param="stop")


def _check_answers(body: GenerationFields, limits: RequestLimits) -> None:
    for name in ("n", "best_of"):
        asked = _declared(body, name) or 1
        if asked > limits.max_choices:
            raise bad_request("invalid_value", f"{name}: at most {limits.max_choices} is allowed (--max-n)", param=name)
    num_prompts = _num_prompts(body)
    num_answers = num_prompts * body.num_candidates
    if num_answers > limits.max_answers:
        allowed = f"at most {limits.max_answers} are allowed in a request (--max-answers)"
        message = f"{body.input_field}: {num_answers} answers to {num_prompts} prompts; {allowed}"
        raise bad_request("invalid_value", message, param=body.input_field)


def _check_beams(body: GenerationFields) -> None:
    num_ids = len(body.stop_token_ids or ())
    if (body.num_beams or 1) > 1 and num_ids > MAX_STOP_TOKEN_IDS_OF_BEAMS:
        message = f"stop_token_ids: {num_ids} token ids; at most {MAX_STOP_TOKEN_IDS_OF_BEAMS} are allowed with num_beams above 1"
        raise bad_request("invalid_value", message, param="stop_token_ids")


def _check_schemas(body: GenerationFields, limits: RequestLimits) -> None:
    for field, size in _schemas(body):
        if size > limits.max_schema_characters:
            message = f"{field}: {size} characters; at most {limits.max_schema_characters} are allowed (--max-schema-characters)"
            raise bad_request("invalid_value", message, param=field)
        num_answers = _num_prompts(body) * body.num_candidates
        if size * num_answers > MAX_SENT_SCHEMA_CHARACTERS:
            message = (
                f"{field}: {size} characters for each of {num_answers} answers; at most {MAX_SENT_SCHEMA_CHARACTERS} in all are allowed"
            )
            raise bad_request("invalid_value", message, param=field)


def _num_prompts(body: GenerationFields) -> int:
    return len(body.prompts()) if isinstance(body, CompletionRequest) else 1


def _schemas(body: GenerationFields) -> Iterator[tuple[str, int]]:
    """Field and number of characters of each schema and grammar."""
    match body.response_format:
        case JsonSchemaFormat(json_schema=described):
            yield "response_format.json_schema.schema", _size(described.schema_)
        case RegexFormat(regex_schema=expression):
            yield "response_format.regex_schema", len(expression)
    outputs = body.structured_outputs
    for name in StructuredOutputs.KINDS if outputs is not None else ():
        if (value := getattr(outputs, name)) is not None:
            yield f"structured_outputs.{name.rstrip('_')}", _size(value)


def _check_tools(tools: Sequence[Any], limits: RequestLimits) -> None:
    size = sum(_size(tool.as_dict()) for tool in tools if hasattr(tool, "as_dict"))  # others become such tools of a chat
    if size > limits.max_schema_characters:
        message = f"tools: {size} characters of JSON; at most {limits.max_schema_characters} are allowed (--max-schema-characters)"
        raise bad_request("invalid_value", message, param="tools")


def _size(value: object) -> int:
    return len(value if isinstance(value, str) else json.dumps(value))
