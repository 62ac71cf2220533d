"""What an answer must look like: from a request's fields to the grammar that the engine follows.

`response_format` is OpenAI's, with LMDeploy's `regex_schema`; `structured_outputs` is vLLM's. Knows nothing of tokens or of HTTP routes.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher, grammar_from
from llguidance.gbnf_to_lark import gbnf_to_lark

from engine.guided import GrammarError
from vlm_server.backend import GrammarReader
from vlm_server.errors import ApiError, bad_request
from vlm_server.format_protocol import JsonObjectFormat, JsonSchema, JsonSchemaFormat, RegexFormat, ResponseFormat, StructuredOutputs
from vlm_server.protocol import GenerationFields

MAX_GBNF_CHARACTERS = 1 << 14  # with as many rules as below, 0.9 s of a thread at worst
MAX_GBNF_RULES = 500
MAX_REPETITIONS = 500  # so many within one another take 0.1 s of a step of the engine, with numbers 0.8 s; 5,000 take 8 s

_LARK = re.compile(r"^[^\S\n]*(%llguidance\b|start\s*:)", re.MULTILINE)  # what no grammar in GBNF has
_REPETITION = re.compile(r"[*+{~&]")  # in texts and comments, too


@dataclass(frozen=True, slots=True)
class _Constraint:
    """What writes a grammar, and the field that it comes from."""

    write: Callable[[], str]
    param: str


async def grammar_of(request: GenerationFields, grammars: GrammarReader) -> str | None:
    """The grammar of all answers to the request, one that can be followed; None: they may be anything.

    Raises ApiError 400, or what `GrammarReader.read` raises where it is busy or broken.
    """
    given = [constraint for constraint in (_of_response_format(request), _of_structured_outputs(request)) if constraint]
    if not given:
        return None
    if len(given) > 1:
        raise _refusal("structured_outputs", "only without a response_format")
    if request.ignore_eos:
        raise _refusal("ignore_eos", "a grammar says where the answer ends; only false is allowed with one")
    [constraint] = given
    try:
        return await grammars.read(constraint.write)
    except (GrammarError, ValueError, RecursionError) as error:
        raise _refusal(constraint.param, str(error)) from error


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
            return _Constraint(lambda: _ANY_OBJECT, "response_format")
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
            return _Constraint(lambda: _ANY_OBJECT, param)
        case "regex":
            return _constraint(LLMatcher.grammar_from_regex, value, param)
        case "choice":
            return _constraint(_choice_grammar, value, param)
        case _:
            return _constraint(_read_grammar, value, param)


def _choice_grammar(choices: list[str]) -> str:
    return grammar_from("choice", json.dumps(choices))


def _read_grammar(text: str) -> str:
    """Lark's notation or llama.cpp's GBNF, whichever it is. Raises ValueError or RecursionError."""
    _check_number(len(_REPETITION.findall(text)), MAX_REPETITIONS, "repetitions (any of * + { ~ &)")
    return LLMatcher.grammar_from_lark(text if _LARK.search(text) else _lark_of(text))


def _lark_of(gbnf: str) -> str:
    """Takes time by the product of the rules' number and their length."""
    _check_number(len(gbnf), MAX_GBNF_CHARACTERS, "characters of GBNF")
    _check_number(gbnf.count("::="), MAX_GBNF_RULES, "rules of GBNF")
    try:
        return gbnf_to_lark(gbnf)
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"it cannot be read as GBNF: {error}") from error


def _check_number(number: int, limit: int, unit: str) -> None:
    if number > limit:
        raise ValueError(f"{number} {unit}; at most {limit} are allowed")


def _constraint(write: Callable[[Any], str], value: object, param: str) -> _Constraint:
    return _Constraint(lambda: write(value), param)


def _refusal(param: str, message: str) -> ApiError:
    return bad_request("invalid_value", f"{param}: {message}", param=param)
