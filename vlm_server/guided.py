"""What an answer must look like: from a request's fields to the grammar that the engine follows.

`response_format` is OpenAI's, with LMDeploy's `regex_schema`; `structured_outputs` is vLLM's. Knows nothing of tokens or of HTTP routes.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher, grammar_from

from engine.guided import GrammarError, check_grammar
from vlm_server.errors import ApiError, bad_request
from vlm_server.format_protocol import JsonObjectFormat, JsonSchema, JsonSchemaFormat, RegexFormat, ResponseFormat, StructuredOutputs
from vlm_server.protocol import GenerationFields


@dataclass(frozen=True, slots=True)
class _Constraint:
    """A grammar and the field that it comes from."""

    grammar: str
    param: str


async def grammar_of(request: GenerationFields) -> str | None:
    """The grammar of all answers to the request, checked in a thread; None: they may be anything. Raises ApiError 400."""
    given = [constraint for constraint in (_of_response_format(request), _of_structured_outputs(request)) if constraint]
    if not given:
        return None
    if len(given) > 1:
        raise _refusal("structured_outputs", "only without a response_format")
    if request.ignore_eos:
        raise _refusal("ignore_eos", "a grammar says where the answer ends; only false is allowed with one")
    try:
        await asyncio.to_thread(check_grammar, given[0].grammar)
    except GrammarError as error:
        raise _refusal(given[0].param, str(error)) from error
    return given[0].grammar


def json_grammar(schema: JsonSchema | str) -> str:
    """The JSON texts that are valid by `schema`. Raises ValueError for a text that is no schema, or RecursionError.

    On one line, as json.dumps writes it: a model that may add white space as it likes adds it for ever.
    """
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "})


_ANY_OBJECT = json_grammar({"type": "object"})


def _of_response_format(request: GenerationFields) -> _Constraint | None:
    response_format: ResponseFormat | None = request.response_format
    match response_format:
        case JsonObjectFormat():
            return _Constraint(_ANY_OBJECT, "response_format")
        case JsonSchemaFormat(json_schema=described):
            return _constraint(json_grammar, described.schema_, "response_format.json_schema.schema")
        case RegexFormat(regex_schema=expression):
            return _constraint(LLMatcher.grammar_from_regex, expression, "response_format.regex_schema")
        case _:
            return None


def _of_structured_outputs(request: GenerationFields) -> _Constraint | None:
    outputs: StructuredOutputs | None = request.structured_outputs
    if outputs is None:
        return None
    given = {name: value for name in StructuredOutputs.KINDS if (value := getattr(outputs, name))}
    if len(given) != 1:
        allowed = ", ".join(name.rstrip("_") for name in StructuredOutputs.KINDS)
        raise _refusal("structured_outputs", f"exactly one of {allowed} is allowed")
    [(name, value)] = given.items()
    param = f"structured_outputs.{name.rstrip('_')}"
    match name:
        case "json_":
            return _constraint(json_grammar, value, param)
        case "json_object":
            return _Constraint(_ANY_OBJECT, param)
        case "regex":
            return _constraint(LLMatcher.grammar_from_regex, value, param)
        case "choice":
            return _constraint(_choice_grammar, value, param)
        case _:
            return _constraint(_read_grammar, value, param)


def _choice_grammar(choices: list[str]) -> str:
    return grammar_from("choice", json.dumps(choices))


def _read_grammar(text: str) -> str:
    """Lark's notation or llama.cpp's GBNF, whichever it is."""
    return grammar_from("grammar", text)


def _constraint(write: Callable[[Any], str], value: object, param: str) -> _Constraint:
    try:
        return _Constraint(write(value), param)
    except (ValueError, RecursionError) as error:
        raise _refusal(param, str(error)) from error


def _refusal(param: str, message: str) -> ApiError:
    return bad_request("invalid_value", f"{param}: {message}", param=param)
