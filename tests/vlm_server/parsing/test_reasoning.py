"""Reasoning told from the answer, cut in every place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vlm_server.parsing.texts import at_any_speed, cuttings
from vlm_server.parsing.events import Content, Event, Reasoning, merged
from vlm_server.parsing.reasoning import REASONING_ALIASES, REASONING_FORMATS, ReasoningReader, reasoning_format_of

THINK = REASONING_FORMATS["think"]
FRAGMENTS = ["<think>", "</think>", "<think", "/think>", "<", "\n", " ", "Hm.", "42", "你好"]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


def read(pieces: list[str] | str, *, is_open: bool) -> list[Event]:
    reader = ReasoningReader(THINK, is_open=is_open)
    return merged([event for piece in pieces for event in reader.feed(piece)] + reader.finish())


@pytest.mark.parametrize(
    ("text", "is_open", "events"),
    [
        ("<think>\nHm.\nSo.\n</think>\n\n42", False, [Reasoning("Hm.\nSo."), Content("42")]),
        ("\n<think>Hm.</think>42\n", False, [Reasoning("Hm."), Content("42\n")]),
        ("Hm.\n</think>\n\n42", True, [Reasoning("Hm."), Content("42")]),
        ("\n\n</think>\n\n42", True, [Content("42")]),
        ("<think>\n\n</think>\n\n42", False, [Content("42")]),
        ("42", False, [Content("42")]),
        ("\n 42 <think>no</think>", False, [Content("\n 42 <think>no</think>")]),
        ("Hm", True, [Reasoning("Hm")]),
        ("Hm</thi", True, [Reasoning("Hm</thi")]),
        ("<thin", False, [Content("<thin")]),
        ("Hm</think>a</think>b", True, [Reasoning("Hm"), Content("a</think>b")]),
        ("", True, []),
        ("", False, []),
    ],
)
def test_reasoning_is_told_from_content_wherever_the_text_is_cut(text: str, is_open: bool, events: list[Event]) -> None:
    assert read([text], is_open=is_open) == events
    assert read(text, is_open=is_open) == events
    for cut in range(len(text)):
        assert read([text[:cut], text[cut:]], is_open=is_open) == events


@at_any_speed
@given(pieces=cuttings(texts), is_open=st.booleans())
def test_no_cutting_changes_what_a_text_is(pieces: list[str], is_open: bool) -> None:
    assert read(pieces, is_open=is_open) == read(["".join(pieces)], is_open=is_open)


@at_any_speed
@given(text=texts.filter(lambda text: not text.lstrip().startswith("<think>")))
def test_an_answer_without_reasoning_is_its_own_content(text: str) -> None:
    assert read(text, is_open=False) == ([Content(text)] if text else [])


def test_reasoning_and_content_are_handed_out_as_they_come() -> None:
    reader = ReasoningReader(THINK, is_open=False)

    assert [reader.feed(piece) for piece in ("<think>", "H", "m</", "think>", "\n4", "2")] == [
        [],
        [Reasoning("H")],
        [Reasoning("m")],
        [],
        [Content("4")],
        [Content("2")],
    ]


def test_the_bounds_of_the_reasoning_are_counted_in_characters_of_the_answer() -> None:
    text = " <think>\nHm.\n</think>\n\n42"
    reader = ReasoningReader(THINK, is_open=False)

    for char in text:
        reader.feed(char)

    assert (reader.begin, reader.end) == (text.index("\n"), text.index("</think>"))


@pytest.mark.parametrize(
    ("text", "is_open"),
    [("<think>", True), ("<think>\nHm, ", True), ("<think>\n\n</think>\n\n", False), ("a</think>", False), ("", False)],
)
def test_a_text_leaves_the_reasoning_open_or_not(text: str, is_open: bool) -> None:
    assert THINK.is_open_after(text) == is_open


def test_the_format_is_seen_in_the_template() -> None:
    assert reasoning_format_of("{{ '<think>\\n' if enable_thinking }}") == "think"
    assert reasoning_format_of("{{ content.split('</think>')[-1] }}") == "think"
    assert reasoning_format_of("[THINK]{{ x }}[/THINK]") == "mistral"
    assert reasoning_format_of("<|im_start|>") is None
    assert set(REASONING_ALIASES.values()) <= set(REASONING_FORMATS)
