"""What a grammar would have to enforce, and how the formats are chosen."""

from typing import Any

import pytest
from llguidance import LLMatcher

from tests.vlm_server.parsing.texts import FORMATS, events_of, read, written
from tests.vlm_server.test_guided import accepts
from vlm_server.answer_formats import AnswerFormats, reasoning_parser_name, tool_parser_name
from vlm_server.answer_grammar import answer_grammar
from vlm_server.errors import ApiError
from vlm_server.guided import json_grammar
from vlm_server.parsing.reasoning import REASONING_FORMATS
from vlm_server.parsing.tool_formats import TOOL_FORMATS
from vlm_server.protocol import ChatCompletionRequest
from vlm_server.tools import CallStructure, call_structure, plan_answer

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **fields}}


def request(**fields: Any) -> ChatCompletionRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [tool("f"), tool("look-up")], **fields}
    return ChatCompletionRequest.model_validate(body)


def structure(format_name: str, **fields: Any) -> CallStructure:
    found = call_structure(request(**fields), TOOL_FORMATS[format_name])
    assert found is not None
    return found


@pytest.mark.parametrize("format_name", FORMATS)
def test_what_follows_the_structure_is_read_as_the_calls(format_name: str) -> None:
    forced = structure(format_name, tool_choice="required")

    texts = [tag.begin + '{"a": 1}' + tag.end for tag in forced.tags]

    text = forced.opening + forced.separator.join(texts) + forced.closing
    assert read(format_name, text) == events_of([("f", '{"a": 1}'), ("look-up", '{"a": 1}')])
    assert (forced.is_forced, forced.max_calls) == (True, None)
    assert [tag.schema for tag in forced.tags] == [SCHEMA, SCHEMA]


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_named_function_is_the_only_one_and_called_once(format_name: str) -> None:
    forced = structure(format_name, tool_choice={"type": "function", "function": {"name": "look-up"}})

    assert len(forced.tags) == 1
    assert "look-up" in forced.tags[0].begin
    assert forced.max_calls == 1


def test_allowed_tools_may_be_required() -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "look-up"}}]}

    forced = structure("hermes", tool_choice={"type": "allowed_tools", "allowed_tools": allowed}, parallel_tool_calls=False)

    assert (forced.is_forced, len(forced.tags), forced.max_calls) == (True, 1, 1)


def test_strict_tools_follow_their_schema_without_being_forced() -> None:
    loose = structure("hermes", tools=[tool("f", strict=True), tool("look-up")])

    assert not loose.is_forced
    assert [tag.schema for tag in loose.tags] == [SCHEMA, {"type": "object"}]


def test_a_function_without_parameters_takes_an_empty_object() -> None:
    forced = structure("hermes", tools=[tool("f", parameters=None)], tool_choice="required")

    assert forced.tags[0].schema == {"type": "object", "properties": {}}


@pytest.mark.parametrize("fields", [{}, {"tool_choice": "auto"}, {"tool_choice": "none"}, {"tools": None}])
def test_what_nobody_forces_needs_no_grammar(fields: dict[str, Any]) -> None:
    assert call_structure(request(**fields), TOOL_FORMATS["hermes"]) is None


def test_the_template_gets_what_the_client_sent() -> None:
    formats = AnswerFormats(TOOL_FORMATS["hermes"], None, shows_tools=True)

    plan = plan_answer(request(tools=[tool("f", description="Does it.", odd=1, strict=None)]), formats)

    assert plan.template_tools() == [{"type": "function", "function": {"name": "f", "description": "Does it.", "parameters": SCHEMA}}]


def test_a_template_without_tools_is_refused_by_the_flag_that_helps() -> None:
    formats = AnswerFormats(TOOL_FORMATS["hermes"], None, shows_tools=False)

    with pytest.raises(ApiError, match="--chat-template FILE") as caught:
        plan_answer(request(), formats)

    assert (caught.value.status, caught.value.param) == (400, "tools")
    assert plan_answer(request(tool_choice="none"), formats).is_plain


@pytest.mark.parametrize(
    ("flags", "template", "tools", "reasoning"),
    [
        (("auto", "auto"), "<tool_call> <think>", "hermes", "think"),
        (("auto", "auto"), "{{ messages }}", None, None),
        (("none", "none"), "<tool_call> <think>", None, None),
        (("llama3_json", "deepseek_r1"), "", "llama3", "think"),
        (("qwen2d5", "qwen-qwq"), "[TOOL_CALLS]", "hermes", "think"),
        (("mistral", "mistral"), "", "mistral", "mistral"),
    ],
)
def test_flags_win_over_the_template(flags: tuple[str, str], template: str, tools: str | None, reasoning: str | None) -> None:
    formats = AnswerFormats.choose(*flags, template=template, shows_tools=True)

    assert formats.tools is (TOOL_FORMATS[tools] if tools else None)
    assert formats.reasoning is (REASONING_FORMATS[reasoning] if reasoning else None)


@pytest.mark.parametrize("name_of", [tool_parser_name, reasoning_parser_name])
def test_an_unknown_parser_is_named_with_those_that_exist(name_of: Any) -> None:
    with pytest.raises(ValueError, match=r"'gpt' is no parser; there are auto, none, .*mistral"):
        name_of("gpt")


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("are_tokens", [False, True], ids=["spelled", "tokens"])
def test_the_grammar_of_a_forced_call_leaves_just_what_the_parser_reads(format_name: str, are_tokens: bool) -> None:
    format = TOOL_FORMATS[format_name]
    plan = plan_answer(request(tool_choice="required"), AnswerFormats(format, None, shows_tools=True))
    ids = {marker: number for number, marker in enumerate(format.markers, 1000)} if are_tokens else {}

    grammar = answer_grammar(plan, None, token_id_of=ids.get, in_reasoning=False)

    assert grammar is not None
    if are_tokens:
        assert all(f"<[{ids[marker]}]>" in grammar for marker in format.markers if marker in str(plan.structure))
        return
    assert accepts(grammar, written(format_name, [("f", '{"a": 1}')]))
    assert accepts(grammar, written(format_name, [("f", '{"a": 1}'), ("look-up", '{"a": -2}')]))
    assert not accepts(grammar, written(format_name, [("g", '{"a": 1}')]))
    assert not accepts(grammar, written(format_name, [("f", '{"a": "1"}')]))
    assert not accepts(grammar, "hello")


@pytest.mark.parametrize("format_name", FORMATS)
def test_strict_tools_are_refused_where_calls_look_like_any_text(format_name: str) -> None:
    formats = AnswerFormats(TOOL_FORMATS[format_name], None, shows_tools=True)
    if format_name == "llama3":
        with pytest.raises(ApiError, match="required"):
            plan_answer(request(tools=[tool("f", strict=True)]), formats)
        return

    plan = plan_answer(request(tools=[tool("f", strict=True)]), formats)
    grammar = answer_grammar(plan, None, token_id_of=lambda word: None, in_reasoning=False)

    assert grammar is not None
    for text in ("hello", written(format_name, [("f", '{"a": 1}')]), "so: " + written(format_name, [("f", '{"a": 1}')])):
        assert accepts(grammar, text), text
    assert not accepts(grammar, written(format_name, [("f", '{"a": "1"}')]))


FORMS = {
    "a schema": (json_grammar({"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}), '{"b": 1}', '{"b": "x"}'),
    "an expression": (LLMatcher.grammar_from_regex("b+"), "bbb", "c"),
    "a client's own grammar": ('start: "b" ANY\nANY: /[0-9]/', "b1", "b"),
}


@pytest.mark.parametrize("kind", FORMS)
def test_a_fixed_form_beside_tools_leaves_the_form_or_calls(kind: str) -> None:
    form, good, bad = FORMS[kind]
    body = request(response_format={"type": "json_object"})
    plan = plan_answer(body, AnswerFormats(TOOL_FORMATS["hermes"], None, shows_tools=True))

    grammar = answer_grammar(plan, form, token_id_of=lambda word: None, in_reasoning=False)

    assert grammar is not None
    assert accepts(grammar, good)
    assert accepts(grammar, written("hermes", [("f", '{"a": 1}')]))
    assert not accepts(grammar, bad)
