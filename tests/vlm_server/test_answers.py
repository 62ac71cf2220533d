"""One answer from the engine's tokens to its events, with a real tokenizer whose markers are special tokens."""

from collections.abc import Sequence
from typing import Any

import pytest

from engine.request import FinishReason, SamplingParams, StepOutput, TokenLogprobs
from tests.tiny_models import make_tokenizer
from tests.vlm_server.byte_tokenizer import ByteTokenizer
from vlm_server.detokenizer import Detokenizer
from vlm_server.generation import Answer, FinishedAnswer, _PendingLogprobs
from vlm_server.parsing.answer import AnswerParser
from vlm_server.parsing.calls import CallReader
from vlm_server.parsing.events import ArgumentPiece, CallBegun, CallEnded, Content, Event, Reasoning, merged
from vlm_server.parsing.reasoning import REASONING_FORMATS, ReasoningReader
from vlm_server.parsing.tool_formats import TOOL_FORMATS
from vlm_server.tokenizer import TextTokenizer

THINK, HERMES = REASONING_FORMATS["think"], TOOL_FORMATS["hermes"]
MARKERS = (THINK.opening, THINK.closing, *HERMES.markers)
TOKENIZER = TextTokenizer(make_tokenizer(("<s>", "</s>", *MARKERS), bos_token="<s>", eos_token="</s>"))
END = TOKENIZER.token_id("</s>")
ARGUMENTS = '{"what": "</tool_call>, 你好"}'
TEXT = f'<think>\nHm: 好.\n</think>\n\n<s>Look:\n<tool_call>\n{{"name": "f", "arguments": {ARGUMENTS}}}\n</tool_call>'
EVENTS = [Reasoning("Hm: 好."), Content("Look:"), CallBegun("f"), ArgumentPiece(ARGUMENTS), CallEnded(True)]


def new_answer() -> Answer:
    parser = AnswerParser(reasoning=ReasoningReader(THINK, is_open=False), calls=CallReader(HERMES.read, ["f"]))
    return Answer(0, SamplingParams(), Detokenizer(TOKENIZER.showing(MARKERS)), includes_stop=False, parser=parser)


def taken(answer: Answer, token_ids: list[int], *, group: int) -> tuple[list[Event], str | None]:
    events: list[Event] = []
    for start in range(0, len(token_ids), group):
        is_last = start + group >= len(token_ids)
        step = StepOutput(request_id="x", token_ids=token_ids[start : start + group], finish_reason=FinishReason.STOP if is_last else None)
        delta = answer.take(step)
        if delta is not None:
            events += delta.events
            reason = delta.finish_reason
    return merged(events), reason


@pytest.mark.parametrize("group", [1, 2, 7, 500])
def test_markers_are_found_where_they_are_special_tokens(group: int) -> None:
    tokens = [*TOKENIZER.encode(TEXT), END]
    assert set(map(TOKENIZER.token_id, MARKERS)) <= set(tokens)

    assert taken(new_answer(), tokens, group=group) == (EVENTS, "tool_calls")


@pytest.mark.parametrize("group", [1, 2, 7, 500])
def test_exactly_the_tokens_between_the_markers_are_reasoning(group: int) -> None:
    tokens = [*TOKENIZER.encode(TEXT), END]
    begin, end = (tokens.index(TOKENIZER.token_id(marker)) for marker in (THINK.opening, THINK.closing))
    answer = new_answer()

    taken(answer, tokens, group=group)

    assert answer.num_reasoning_tokens == end - begin - 1
    assert answer.num_tokens == len(tokens)


def test_tokens_that_a_stop_string_holds_back_are_not_walked_for_each_that_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long stop string held thousands, of each of many answers."""
    num_held, num_looked_at = 300, 0

    class Noted(_PendingLogprobs):
        def __getattribute__(self, name: str) -> Any:
            nonlocal num_looked_at
            num_looked_at += name == "end"
            return super().__getattribute__(name)

    monkeypatch.setattr("vlm_server.generation._PendingLogprobs", Noted)
    detokenizer = Detokenizer(TOKENIZER, stops=("x" * 10 * num_held,))
    answer = Answer(0, SamplingParams(logprobs=0), detokenizer, includes_stop=False)
    (token_id,) = TOKENIZER.encode("x")

    for _ in range(num_held):
        assert answer.take(StepOutput(request_id="x", token_ids=[token_id], logprobs=[TokenLogprobs(token_id, -1.0, 1)])) is None

    assert num_looked_at < 10 * num_held
    last = answer.take(StepOutput(request_id="x", finish_reason=FinishReason.LENGTH))
    assert last is not None
    assert last.text == "x" * num_held
    assert last.offsets == list(range(num_held))


def test_every_piece_comes_with_the_token_that_completes_it() -> None:
    """Nothing is held back for longer than it may still be a marker, or white space in front of a call."""
    answer = new_answer()
    shown: dict[str, str] = {}

    for token_id in TOKENIZER.encode("<think>Hm.</think>Look at the quick brown fox"):
        delta = answer.take(StepOutput(request_id="x", token_ids=[token_id]))
        for event in delta.events if delta is not None else ():
            assert isinstance(event, Reasoning | Content)
            shown[type(event).__name__] = shown.get(type(event).__name__, "") + event.text

    assert shown == {"Reasoning": "Hm.", "Content": "Look at the quick brown fox"}


class FallbackBytes(ByteTokenizer):
    """Writes a replacement character for each byte of an unfinished character, as byte fallback does."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(token_ids).decode("utf-8", "surrogateescape").translate(dict.fromkeys(range(0xDC80, 0xDD00), "\ufffd"))


def scored(answer: Answer, token_ids: Sequence[int], *, group: int = 1) -> tuple[str, list[int], list[int]]:
    """The text, and of the reported tokens the ids and the offsets."""
    finished = FinishedAnswer()
    for start in range(0, len(token_ids), group):
        ids = list(token_ids[start : start + group])
        reason = FinishReason.LENGTH if start + group >= len(token_ids) else None
        logprobs = [TokenLogprobs(token_id, -1.0, 1) for token_id in ids]
        delta = answer.take(StepOutput(request_id="x", token_ids=ids, logprobs=logprobs, finish_reason=reason))
        if delta is not None:
            finished.add(delta)
        if answer.finish_reason is not None:
            break
    return finished.text, [token.token_id for token in finished.logprobs or ()], finished.offsets


@pytest.mark.parametrize("group", [1, 2, 7])
@pytest.mark.parametrize(
    ("data", "stops", "text", "offsets"),
    [
        (b"ab\xffcd", (), "ab\ufffdcd", [0, 1, 2, 3, 4]),
        (b"ab\xffcd", ("c",), "ab\ufffd", [0, 1, 2]),
        (b"ab\xff\xffcd", ("d",), "ab\ufffd\ufffdc", [0, 1, 2, 3, 4]),
        (b"a\xff\xc3\xa9b", (), "a\ufffdéb", [0, 1, 2, 2, 3]),
        (b"ab\xff\xff", (), "ab", [0, 1, 2, 2]),  # the text's end has no unfinished characters
    ],
)
def test_a_token_behind_bytes_that_are_no_character_has_its_own_place(
    data: bytes, stops: tuple[str, ...], text: str, offsets: list[int], group: int
) -> None:
    answer = Answer(0, SamplingParams(logprobs=0), Detokenizer(ByteTokenizer(), stops=stops), includes_stop=False)

    assert scored(answer, data, group=group) == (text, list(data[: len(offsets)]), offsets)


def test_the_bytes_of_one_character_begin_where_it_does() -> None:
    answer = Answer(0, SamplingParams(logprobs=0), Detokenizer(FallbackBytes()), includes_stop=False)

    assert scored(answer, "a好b".encode()) == ("a好b", list("a好b".encode()), [0, 1, 1, 1, 2])


def test_bytes_that_are_no_character_bring_no_token_of_a_marker_into_the_reasoning() -> None:
    parser = AnswerParser(reasoning=ReasoningReader(THINK, is_open=True))
    answer = Answer(0, SamplingParams(logprobs=0), Detokenizer(ByteTokenizer()), includes_stop=False, parser=parser)

    scored(answer, b"Hm\xff</think>Yes")

    assert answer.num_reasoning_tokens == 3
