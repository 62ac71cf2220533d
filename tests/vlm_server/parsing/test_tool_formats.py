"""Calls in every format, cut in every place."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.image_fixtures import EMBEDDED, tiny_folder
from tests.vlm_server.parsing.texts import (
    FORMATS,
    MARKERS,
    Call,
    arguments,
    at_any_speed,
    broken_texts,
    calls,
    content_of,
    cuttings,
    events_of,
    json_values,
    read,
    written,
)
from vlm_server.detokenizer import Detokenizer
from vlm_server.parsing.calls import CallReader
from vlm_server.parsing.events import ArgumentPiece, CallBegun, CallEnded, Content, Event
from vlm_server.parsing.tool_formats import TOOL_ALIASES, TOOL_FORMATS, tool_format_of
from vlm_server.tokenizer import TextTokenizer, load_tokenizer

TWO: list[Call] = [("get_weather", '{"city": "杭州", "days": [1, {"a": null}]}'), ("f", '{"x": "}</tool_call>\\"{"}')]
BOTH = [pytest.param(name, "", id=f"{name} alone") for name in FORMATS] + [
    pytest.param(name, "Let me look.\n\n", id=f"{name} behind content") for name in FORMATS if name != "llama3"
]
TOKENIZER = TextTokenizer(load_tokenizer(tiny_folder(EMBEDDED)))
DEEPSEEK_CALL = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>'


def before(content: str) -> list[Event]:
    return [Content(content.rstrip())] if content else []


@pytest.mark.parametrize(("format_name", "content"), BOTH)
def test_calls_are_read_wherever_the_text_is_cut(format_name: str, content: str) -> None:
    text = content + written(format_name, TWO)
    expected = before(content) + events_of(TWO)

    assert read(format_name, [text]) == expected
    assert read(format_name, text) == expected
    for cut in range(len(text)):
        assert read(format_name, [text[:cut], text[cut:]]) == expected


@pytest.mark.parametrize("format_name", FORMATS)
@at_any_speed
@given(calls=calls)
def test_arguments_are_the_models_own_text(format_name: str, calls: list[Call]) -> None:
    assert read(format_name, written(format_name, calls)) == events_of(calls)


@pytest.mark.parametrize("format_name", FORMATS)
@at_any_speed
@given(pieces=cuttings(broken_texts))
def test_no_cutting_changes_what_a_text_is(format_name: str, pieces: list[str]) -> None:
    assert read(format_name, pieces) == read(format_name, ["".join(pieces)])


@pytest.mark.parametrize("format_name", FORMATS)
@at_any_speed
@given(text=broken_texts)
def test_a_text_that_holds_no_call_is_its_own_content(format_name: str, text: str) -> None:
    events = read(format_name, text, names=["nobody knows"])

    assert content_of(events) == text
    assert len(events) <= 1


@pytest.mark.parametrize("format_name", FORMATS)
@at_any_speed
@given(text=broken_texts)
def test_every_call_is_begun_and_ended_once(format_name: str, text: str) -> None:
    kinds = "".join({CallBegun: "b", ArgumentPiece: "a", CallEnded: "e", Content: "c"}[type(event)] for event in read(format_name, text))

    assert set(kinds.replace("bae", "")) <= {"c"}


@pytest.mark.parametrize(("format_name", "content"), BOTH)
def test_no_part_of_a_marker_is_ever_handed_out_as_content(format_name: str, content: str) -> None:
    reader = CallReader(TOOL_FORMATS[format_name].read, ["f", "get_weather"])
    shown = ""

    for char in content + written(format_name, TWO):
        shown += content_of(reader.feed(char))
        assert content.startswith(shown)

    assert content_of(reader.finish()) == ""
    assert shown == content.rstrip()


@pytest.mark.parametrize(("format_name", "content"), BOTH)
def test_a_text_that_ends_in_a_call_keeps_what_there_is(format_name: str, content: str) -> None:
    """By length: before its arguments begin a call is content, then it is a call with as much of its arguments as there is."""
    text = content + written(format_name, TWO[:1])
    name, whole = TWO[0]
    begins = text.index(whole)

    for end in range(len(content), len(text)):
        events = read(format_name, [text[:end]])
        if end <= begins:
            assert content_of(events) == text[:end]
        elif end < begins + len(whole):
            assert events == [*before(content), CallBegun(name), ArgumentPiece(text[begins:end]), CallEnded(False)]
        else:
            assert events == before(content) + events_of(TWO[:1])


@pytest.mark.parametrize("format_name", FORMATS)
def test_arguments_are_handed_out_as_they_come(format_name: str) -> None:
    text = written(format_name, TWO[:1])
    begins = text.index("{", text.index("get_weather"))
    reader = CallReader(TOOL_FORMATS[format_name].read, ["get_weather"])

    assert reader.feed(text[: begins + 1])[:2] == [CallBegun("get_weather"), ArgumentPiece("{")]
    assert reader.feed('"ci') == [ArgumentPiece('"ci')]


@pytest.mark.parametrize("format_name", FORMATS)
@at_any_speed
@given(value=json_values.filter(lambda value: value is not None and not isinstance(value, dict)))
def test_arguments_that_are_no_object_are_content(format_name: str, value: object) -> None:
    text = written(format_name, [("f", json.dumps(value))])

    assert content_of(read(format_name, text)) == text


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_function_that_nobody_offered_is_content(format_name: str) -> None:
    text = written(format_name, [("rm_rf", '{"path": "/"}')])

    assert read(format_name, text) == [Content(text)]


@pytest.mark.parametrize("format_name", FORMATS)
def test_spaces_between_content_and_calls_are_the_formats(format_name: str) -> None:
    text = written(format_name, TWO[:1]) + "\n\n That was it. \n"

    assert read(format_name, text) == [*events_of(TWO[:1]), Content("That was it. \n")]


@pytest.mark.parametrize("format_name", FORMATS)
def test_content_without_calls_keeps_its_spaces(format_name: str) -> None:
    assert read(format_name, "\n a  b \n\n") == [Content("\n a  b \n\n")]


CALL_F = [CallBegun("f"), ArgumentPiece('{"a": 1}'), CallEnded(True)]
CALL_G = [CallBegun("look-up"), ArgumentPiece("{}"), CallEnded(True)]


@pytest.mark.parametrize(
    ("format_name", "text", "events"),
    [
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', CALL_F),
        ("hermes", '<tool_call>\n{"id": 7, "name":"f","arguments":{"a": 1}, "x": [{}]}\n</tool_call>', CALL_F),
        ("hermes", '<tool_call>{"name": "look-up"}</tool_call>', CALL_G),
        ("hermes", '<tool_call>{"name": "look-up", "arguments": null}</tool_call>', CALL_G),
        ("hermes", '<tool_call>{"name": "\\u0066", "arguments": {"a": 1}}</tool_call>', CALL_F),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call> Yes.', [*CALL_F, Content("Yes.")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}<tool_call>{"name": "look-up"}</tool_call>', [*CALL_F, *CALL_G]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}} so</tool_call>!', [*CALL_F, Content("so!")]),
        ("hermes", '<tool_call><tool_call>{"name": "look-up"}</tool_call>', [Content("<tool_call>"), *CALL_G]),
        ("hermes", "a <b> </tool_call> c", [Content("a <b> </tool_call> c")]),
        ("hermes", "<tool_call>f(1)</tool_call>", [Content("<tool_call>f(1)</tool_call>")]),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"a": 1]}}</tool_call>',
            [CallBegun("f"), ArgumentPiece('{"a": 1'), CallEnded(False), Content("]}}")],
        ),
        ("llama3", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', CALL_F),
        ("llama3", '\n{"type": "function", "name": "f", "parameters": {"a": 1}}', CALL_F),
        ("llama3", '{"name": "f", "parameters": {"a": 1}};{"name": "look-up"}', [*CALL_F, *CALL_G]),
        ("llama3", 'I call <|python_tag|>{"name": "f", "parameters": {"a": 1}}', [Content("I call"), *CALL_F]),
        ("llama3", 'As JSON: {"name": "f", "parameters": {}}', [Content('As JSON: {"name": "f", "parameters": {}}')]),
        ("llama3", '{"name": "Bob", "parameters": {}}', [Content('{"name": "Bob", "parameters": {}}')]),
        ("llama3", '<|python_tag|>print("hi")', [Content('<|python_tag|>print("hi")')]),
        ("internlm", '<|action_start|><|plugin|>\n{"name": "f", "arguments": {"a": 1}}\n<|action_end|>\n', CALL_F),
        ("internlm", "<|action_start|><|interpreter|>\nx", [Content("<|action_start|><|interpreter|>\nx")]),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "look-up"}]', [*CALL_F, *CALL_G]),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]look-up[ARGS]{}', [*CALL_F, *CALL_G]),
        ("mistral", '[TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]{"a": 1}', CALL_F),
        ("mistral", '[TOOL_CALLS]f{"a": 1}', CALL_F),
        ("mistral", "[TOOL_CALLS][]", [Content("[TOOL_CALLS][]")]),
        ("deepseek-v3", DEEPSEEK_CALL, CALL_F),
        ("deepseek-v3", DEEPSEEK_CALL + "<｜tool▁calls▁end｜>", CALL_F),
        ("deepseek-v3", DEEPSEEK_CALL + " so <｜tool▁call▁end｜>x<｜tool▁calls▁end｜>", [*CALL_F, Content("so x")]),
        ("deepseek-v3", DEEPSEEK_CALL + "\n<｜tool▁call▁begin｜>", CALL_F),
        ("deepseek-v31", DEEPSEEK_CALL, CALL_F),
    ],
)  # fmt: skip
def test_what_models_also_write(format_name: str, text: str, events: list[Event]) -> None:
    assert read(format_name, [text]) == events
    assert read(format_name, text) == events


def test_an_answer_that_is_json_is_not_held_back() -> None:
    reader = CallReader(TOOL_FORMATS["llama3"].read, ["f"])

    assert content_of(reader.feed('{"result": [1, 2')) == '{"result": [1, 2'


def test_long_strings_in_front_of_a_call_are_not_held_back() -> None:
    reader = CallReader(TOOL_FORMATS["hermes"].read, ["f"])

    assert len(content_of(reader.feed('<tool_call>{"' + "x" * 500))) == len('<tool_call>{"') + 500


@pytest.mark.parametrize("format_name", FORMATS)
@at_any_speed
@given(text=arguments())
def test_token_streams_of_a_real_tokenizer_give_the_same_calls(format_name: str, text: str) -> None:
    tokens = TOKENIZER.encode(written(format_name, [("get_weather", text), ("f", text)]))
    detokenizer = Detokenizer(TOKENIZER)

    pieces = [detokenizer.add(token_id) for token_id in tokens] + [detokenizer.finish()]

    shown = TOKENIZER.decode(TOKENIZER.encode(text))  # SmolLM2's vocabulary lacks some bytes
    assert read(format_name, pieces) == events_of([("get_weather", shown), ("f", shown)])


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<tool_call>\n' + call | tojson }}", "hermes"),
        ("<tool_call>\n<function=...>", None),
        ("<|python_tag|>", "llama3"),
        ('{"name": "f", "parameters": } {% if role == "ipython" %}', "llama3"),
        ("<|action_start|><|plugin|>", "internlm"),
        ("[TOOL_CALLS][", "mistral"),
        ("[TOOL_CALLS]f[ARGS]", "mistral-args"),
        ("<｜tool▁calls▁begin｜>\n```json", "deepseek-v3"),
        ("<｜tool▁calls▁begin｜>", "deepseek-v31"),
        ("<|im_start|>", None),
    ],
)
def test_the_format_is_seen_in_the_template(template: str, name: str | None) -> None:
    assert tool_format_of(template) == name


def test_every_alias_is_of_a_format_and_every_marker_is_in_its_format() -> None:
    assert set(TOOL_ALIASES.values()) <= set(TOOL_FORMATS)
    for name, format in TOOL_FORMATS.items():
        text = written(name, TWO)
        assert format.markers
        assert all(marker in MARKERS for marker in format.markers)
        assert name in ("llama3", "mistral") or all(marker in text for marker in format.markers if marker != "[CALL_ID]")


@at_any_speed
@given(st.lists(st.text(alphabet=" \n", max_size=3), max_size=5))
def test_spaces_alone_are_content(pieces: list[str]) -> None:
    assert content_of(read("hermes", pieces)) == "".join(pieces)
