"""Reasoning, content and calls of one answer together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vlm_server.parsing.texts import FORMATS, MARKERS, NAMES, Call, at_any_speed, broken_texts, calls, cuttings, events_of, written
from vlm_server.parsing.answer import AnswerParser
from vlm_server.parsing.calls import CallReader
from vlm_server.parsing.events import Content, Event, Reasoning, merged
from vlm_server.parsing.reasoning import REASONING_FORMATS, ReasoningReader
from vlm_server.parsing.tool_formats import TOOL_FORMATS

CALLS = [("f", '{"a": 1}'), ("get_weather", "{}")]


def parser(format_name: str, *, is_open: bool = False, one_call: bool = False) -> AnswerParser:
    return AnswerParser(
        reasoning=ReasoningReader(REASONING_FORMATS["think"], is_open=is_open),
        calls=CallReader(TOOL_FORMATS[format_name].read, NAMES),
        one_call=one_call,
    )


def read(parser: AnswerParser, pieces: list[str] | str) -> list[Event]:
    return merged([event for piece in pieces for event in parser.feed(piece)] + parser.finish())


@pytest.mark.parametrize("format_name", FORMATS)
def test_reasoning_comes_before_calls_and_holds_none(format_name: str) -> None:
    text = f"<think>\nI could write {written(format_name, CALLS)}\n</think>\n\n{written(format_name, CALLS)}"
    expected = [Reasoning(f"I could write {written(format_name, CALLS)}"), *events_of(CALLS)]

    for pieces in ([text], list(text)):
        answer = parser(format_name)
        assert read(answer, pieces) == expected
        assert answer.has_calls


@pytest.mark.parametrize("format_name", FORMATS)
@at_any_speed
@given(pieces=cuttings(st.lists(st.sampled_from([*MARKERS, "<think>", "</think>", "\n", '{"name": "f"}', "x"]), max_size=12).map("".join)))
def test_no_cutting_changes_what_an_answer_is(format_name: str, pieces: list[str]) -> None:
    assert read(parser(format_name), pieces) == read(parser(format_name), ["".join(pieces)])


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("has_reasoning", [True, False])
@at_any_speed
@given(text=broken_texts, opening=st.sampled_from(["", "<think>", "\n<think>\nHm\n</think>\n\n"]), calls=calls)
def test_content_knows_where_in_the_answer_it_stands(
    format_name: str, has_reasoning: bool, text: str, opening: str, calls: list[Call]
) -> None:
    answer = opening + text[: len(text) // 2] + written(format_name, calls) + text[len(text) // 2 :]
    reader = parser(format_name) if has_reasoning else AnswerParser(calls=CallReader(TOOL_FORMATS[format_name].read, NAMES))

    end = 0
    for event in read(reader, list(answer)):
        if isinstance(event, Content):
            assert event.place is not None
            assert event.place >= end
            end = event.place + len(event.text)
            assert answer[event.place : end] == event.text


@pytest.mark.parametrize("format_name", FORMATS)
def test_one_call_ends_the_answer(format_name: str) -> None:
    text = written(format_name, CALLS)
    answer = parser(format_name, one_call=True)

    num_fed = next(number for number, char in enumerate(text, start=1) if answer.feed(char) and answer.is_done)

    assert text[:num_fed].endswith('{"a": 1}')
    assert answer.feed(text[num_fed:]) + answer.finish() == []
    assert answer.has_calls


def test_calls_that_were_cut_off_are_no_calls_to_be_made() -> None:
    answer = parser("hermes")

    read(answer, '<tool_call>{"name": "f", "arguments": {"a"')

    assert not answer.has_calls


def test_without_readers_all_text_is_content() -> None:
    answer = AnswerParser()

    assert read(answer, ["<think>", "", "<tool_call>"]) == [Content("<think><tool_call>")]
    assert not answer.counts_reasoning
    assert not answer.is_reasoning_at(0)


def test_characters_between_the_markers_are_reasoning() -> None:
    text = "<think>Hm.</think>42"
    answer = parser("hermes")
    read(answer, text)

    assert "".join(char for place, char in enumerate(text) if answer.is_reasoning_at(place)) == "Hm."
