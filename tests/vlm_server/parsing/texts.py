"""Texts as models write them, whole and broken, and what reads them: shared by the tests of the parsers."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from vlm_server.parsing.calls import CallReader
from vlm_server.parsing.events import ArgumentPiece, CallBegun, CallEnded, Content, Event, merged
from vlm_server.parsing.tool_formats import TOOL_FORMATS

NAMES = ("get_weather", "look-up", "f")
FORMATS = sorted(TOOL_FORMATS)
MARKERS = sorted({marker for format in TOOL_FORMATS.values() for marker in format.markers})

at_any_speed = settings(deadline=None)  # a busy machine is no failure

Call = tuple[str, str]  # name and the arguments' JSON text

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.sampled_from(MARKERS),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)


@st.composite
def arguments(draw: st.DrawFn) -> str:
    """JSON text of an object, in one of the styles in which models write it."""
    value = draw(st.dictionaries(st.text(max_size=8) | st.sampled_from(MARKERS), json_values, max_size=4))
    return json.dumps(value, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 2])))


calls = st.lists(st.tuples(st.sampled_from(NAMES), arguments()), min_size=1, max_size=3)

# Pieces that texts of models are broken into, in any order: most of them make no call.
_FRAGMENTS = [
    *MARKERS, *(marker[:-1] for marker in MARKERS), *(marker[1:] for marker in MARKERS),
    *('{"name": "f"', '"arguments": ', '"parameters":{', '{"name": "f", "arguments": {"a": [{}]}}', '{"name": "g"}'),
    *("{", "}", "[", "]", ",", ";", ":", '"', "\\", "\n", " ", "```json\n", "\n```", "function", "f", "look-up", "<", "hello", "你好 🌍"),
]  # fmt: skip
broken_texts = st.lists(st.sampled_from(_FRAGMENTS), max_size=25).map("".join)


def written(format_name: str, calls: Sequence[Call]) -> str:
    """The calls as a model writes them in a format."""
    format = TOOL_FORMATS[format_name]
    tags = [format.begin_of(name) + text + format.end for name, text in calls]
    return format.opening + format.separator.join(tags) + format.closing


def events_of(calls: Sequence[Call]) -> list[Event]:
    return [event for name, text in calls for event in (CallBegun(name), ArgumentPiece(text), CallEnded(True))]


def read(format_name: str, pieces: Iterable[str], *, names: Iterable[str] = NAMES) -> list[Event]:
    """All events of a text that comes in pieces, neighbours merged wherever they stood."""
    reader = CallReader(TOOL_FORMATS[format_name].read, list(names))
    events = [event for piece in pieces for event in reader.feed(piece)]
    return merged(Content(event.text) if isinstance(event, Content) else event for event in events + reader.finish())


def content_of(events: Iterable[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


@st.composite
def cuttings(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> list[str]:
    """A text in pieces."""
    text = draw(texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
