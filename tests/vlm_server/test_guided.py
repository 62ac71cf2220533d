"""`response_format` and `structured_outputs`: which grammar the engine gets, and what is refused by name."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import requests
from llguidance import LLMatcher, LLTokenizer, grammar_from

from engine.request import FinishReason, StepOutput
from tests.contract.running import RunningServer
from tests.vlm_server.test_fields import post_chat, post_completion, sampled_with
from vlm_server import guided
from vlm_server.guided import _read_grammar

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
BYTES = LLTokenizer("byte")

Sample = tuple[dict[str, Any], list[str], list[str]]
SAMPLES: dict[str, Sample] = {
    "json_object": ({"response_format": {"type": "json_object"}}, ["{}", '{"a": [1, {}]}'], ["[]", "1", '{"a": ']),
    "json_schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}},
        ['{"name": "Zoé", "age": 3}'],
        ['{"name": "Zoé"}', '{"name": "Zoé", "age": 3, "x": 1}', '{"age": 3, "name": "Zoé"}', '{"name": "Zoé",\n"age": 3}'],
    ),
    "regex_schema": (
        {"response_format": {"type": "regex_schema", "regex_schema": r"\d{3}-(red|blue)"}},
        ["123-red"],
        ["12-red", "123-redx", " 123-red"],
    ),
    "structured json": ({"structured_outputs": {"json": PERSON}}, ['{"name": "", "age": -1}'], ["{}"]),
    "structured json as text": ({"structured_outputs": {"json": json.dumps(PERSON)}}, ['{"name": "", "age": -1}'], ["{}"]),
    "structured json_object": ({"structured_outputs": {"json_object": True}}, ["{}"], ["[]"]),
    "structured regex": ({"structured_outputs": {"regex": "a+"}}, ["aaa"], ["b"]),
    "structured choice": (
        {"structured_outputs": {"choice": ['say "hi"', "你好", "line\nbreak", "a\\b"]}},
        ['say "hi"', "你好", "line\nbreak", "a\\b"],
        ["say", "你", "x"],
    ),
    "structured grammar": ({"structured_outputs": {"grammar": 'start: "a" start | "b"'}}, ["b", "aab"], ["a", "ba"]),
    "structured GBNF": ({"structured_outputs": {"grammar": 'root ::= "x" [0-9]+'}}, ["x12"], ["x", "12"]),
}


def accepts(grammar: str, text: str) -> bool:
    matcher = LLMatcher(BYTES, grammar, log_level=0)
    return matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and matcher.is_accepting()


@pytest.mark.parametrize("name", SAMPLES)
def test_the_engine_is_given_a_grammar_of_just_these_texts(server: RunningServer, name: str) -> None:
    fields, right, wrong = SAMPLES[name]
    for post in (post_chat, post_completion):
        assert post(server, **fields).status_code == 200

        grammar = sampled_with(server).grammar

        assert grammar is not None
        assert [text for text in right if not accepts(grammar, text)] == []
        assert [text for text in wrong if accepts(grammar, text)] == []


@pytest.mark.parametrize("fields", [{}, {"response_format": None}, {"response_format": {"type": "text"}}, {"structured_outputs": None}])
def test_without_a_format_there_is_no_grammar(server: RunningServer, fields: dict[str, Any]) -> None:
    assert post_chat(server, **fields).status_code == 200
    assert sampled_with(server).grammar is None


def schema_format(schema: object) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (schema_format({"type": "strin"}), "response_format.json_schema.schema", "strin"),
        (schema_format({"not": {"type": "null"}}), "response_format.json_schema.schema", "not"),
        (schema_format({"$ref": "#/nowhere"}), "response_format.json_schema.schema", "nowhere"),
        (schema_format({"type": "string", "pattern": "("}), "response_format.json_schema.schema", "unclosed"),
        (schema_format(nested(150)), "response_format", "128 levels"),
        ({"structured_outputs": {"json": json.dumps(nested(150))}}, "structured_outputs.json", "recursion"),
        (schema_format({"enum": ["x" * 300_000]}), "response_format.json_schema.schema", "at most 262144"),
        (schema_format(3), "response_format", "schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_object"),
        ({"response_format": {"type": "regex_schema", "regex_schema": "(?=x)"}}, "response_format.regex_schema", "look-around"),
        ({"response_format": {"type": "regex_schema", "regex_schema": ""}}, "response_format.regex_schema", ""),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", ""),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json", ""),
        ({"structured_outputs": {"grammar": "start: %%%"}}, "structured_outputs.grammar", ""),
        ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs.grammar", ""),
        ({"structured_outputs": {"grammar": "\n" * 200_000}}, "structured_outputs.grammar", "at most 16384 are allowed"),
        ({"structured_outputs": {"grammar": "root ::= r0\n" * 501}}, "structured_outputs.grammar", "501 rules of GBNF; at most 500"),
        ({"structured_outputs": {"grammar": "start: " + '("a")+' * 501}}, "structured_outputs.grammar", "501 repetitions"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "not supported"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs", "response_format"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos", "grammar"),
        ({"guided_choice": ["a"]}, "guided_choice", "not supported"),
    ],
)
def test_a_format_that_cannot_be_followed_is_refused_by_name(
    server: RunningServer, fields: dict[str, Any], param: str, message: str
) -> None:
    response: requests.Response = post_chat(server, **fields)

    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"].startswith(param)
    assert message in error["message"]
    assert server.backend.engine.requests == []


# How llguidance itself tells the two apart and converts them: the grammars below must be read as it reads them.
NOTATIONS = {
    "lark": 'start: "a"',
    "lark behind blanks": ' \n\t\r\n\x0b start \n : "a"',
    "lark with a header": '%llguidance {}\nstart: "a"',
    "lark with another rule first": 'x: "a"\nstart: x',
    "a header alone": "  %llguidance {}",
    "no header": '%llguidanceX\nroot ::= "a"',
    "start within a line": 'root ::= start: "a"',
    "starting": 'starting: "a"',
    "GBNF with a start": 'root ::= start\nstart ::= "a"',
    "GBNF": 'root ::= item ("," item)*\nitem ::= [a-z]+ | some-rule\nsome-rule ::= "x"{2,3} # twice\n',
    "empty": "",
}


@pytest.mark.parametrize("name", NOTATIONS)
def test_both_notations_are_read_as_the_library_reads_them(name: str) -> None:
    def outcome(read: Callable[[str], str]) -> str:
        try:
            return read(NOTATIONS[name])
        except ValueError:
            return "refused"

    assert outcome(_read_grammar) == outcome(lambda text: grammar_from("grammar", text))


def test_a_grammar_is_written_beside_the_event_loop(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: telling Lark from GBNF took minutes of the loop, for newlines alone."""
    threads: list[str] = []

    def convert(text: str) -> str:
        threads.append(threading.current_thread().name)
        return 'start: "a"'

    monkeypatch.setattr(guided, "gbnf_to_lark", convert)

    assert post_chat(server, structured_outputs={"grammar": 'root ::= "a"'}).status_code == 200
    assert [name.startswith("asyncio_") for name in threads] == [True]


def test_unknown_keys_of_a_format_are_warned_about(server: RunningServer) -> None:
    response = post_chat(server, response_format={"type": "json_object", "indent": 2})

    assert response.status_code == 200
    assert response.json()["warnings"] == ["response_format.indent: no API documents this field; it has no effect"]


@pytest.mark.parametrize(("is_refusal", "status", "code"), [(True, 400, "grammar_too_complex"), (False, 500, "engine_error")])
def test_a_grammar_that_takes_too_much_to_follow_is_no_fault_of_the_engine(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, is_refusal: bool, status: int, code: str
) -> None:
    """Regression: a client's own grammar was a 500."""
    failure = "the grammar: Too many items"
    output = StepOutput(request_id="x", finish_reason=FinishReason.ERROR, error=failure, is_refusal=is_refusal)
    monkeypatch.setattr(server.backend.engine, "_outputs", lambda *args: [output])

    response = post_chat(server, structured_outputs={"regex": "a+"})

    assert response.status_code == status
    assert (response.json()["error"]["code"], response.json()["error"]["message"]) == (code, failure)
