"""Output items and their events: folded as a client folds them, the events are the items; log probabilities find their text."""

import itertools
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.request import FinishReason, InvalidRequestError, QueueFullError, SamplingParams, StepOutput, TokenLogprobs
from tests.vlm_server.byte_tokenizer import BOS, FIRST_PIECE, VOCAB_SIZE, ByteTokenizer
from vlm_server.detokenizer import Detokenizer
from vlm_server.errors import ApiError, to_api_error
from vlm_server.generation import Answer, Delta, FinishedAnswer, Usage
from vlm_server.parsing.answer import AnswerParser
from vlm_server.parsing.calls import CallReader
from vlm_server.parsing.events import ArgumentPiece, CallBegun, CallEnded, Content, Event, Reasoning, merged
from vlm_server.parsing.reasoning import REASONING_FORMATS, ReasoningReader
from vlm_server.parsing.tool_formats import TOOL_FORMATS
from vlm_server.responses.field_paths import FieldPaths
from vlm_server.responses.items import ITEMS
from vlm_server.responses.output import OutputWriter
from vlm_server.responses.shape import ResponseShape
from vlm_server.responses.token_texts import TokenTexts
from vlm_server.sessions.store import StoreError, StoreFullError

USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1, image_tokens=0, reasoning_tokens=1)
TEXTS = st.text(max_size=3)


@st.composite
def calls(draw: st.DrawFn) -> list[Event]:
    pieces = draw(st.lists(TEXTS, max_size=3))
    return [CallBegun(draw(st.sampled_from("fg"))), *map(ArgumentPiece, pieces), CallEnded(draw(st.booleans()))]


EVENTS = st.lists(calls() | TEXTS.map(lambda text: [Content(text)]) | TEXTS.map(lambda text: [Reasoning(text)]), max_size=8).map(
    lambda groups: list(itertools.chain.from_iterable(groups))
)


def shape() -> ResponseShape:
    return ResponseShape({"id": "resp_1", "output": [], "status": "in_progress"}, ByteTokenizer(), paths=FieldPaths({}))


def streamed(events: list[Event], cuts: list[bool], finish_reason: str) -> list[dict[str, Any]]:
    """The chunks of a stream whose deltas end where `cuts` say so."""
    written = shape()
    chunks = written.first_chunks(1, USAGE)
    step: list[Event] = []
    for event, is_end in zip(events, cuts, strict=True):
        step.append(event)
        if is_end:
            chunks += written.chunks(Delta(0, "", None, None, merged(step)))
            step = []
    chunks += written.chunks(Delta(0, "", None, finish_reason, merged(step)))
    return chunks + written.last_chunks(USAGE)


def folded(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output that a client puts together of all events but the last. Whatever an event says again must be what came before."""
    output: list[dict[str, Any]] = []
    for chunk in chunks[2:-1]:
        kind = chunk["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert chunk["output_index"] == len(output)
            output.append(dict(chunk["item"]))
            continue
        item = output[chunk["output_index"]]
        assert chunk.get("item_id", item["id"]) == item["id"]
        if kind == "content_part.added":
            item["content"] = [*item["content"], dict(chunk["part"])]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += chunk["delta"]
        elif kind in ("output_text.delta", "reasoning_text.delta"):
            item["content"][chunk["content_index"]]["text"] += chunk["delta"]
        elif kind == "function_call_arguments.done":
            assert (chunk["arguments"], chunk["name"]) == (item["arguments"], item["name"])
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert chunk["text"] == item["content"][chunk["content_index"]]["text"]
        elif kind == "content_part.done":
            assert chunk["part"] == item["content"][chunk["content_index"]]
        else:
            assert kind == "output_item.done"
            item["status"] = chunk["item"]["status"]
            assert chunk["item"] == item
    return output


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    output = [{name: value for name, value in item.items() if name not in ("id", "call_id")} for item in response["output"]]
    return {name: value for name, value in response.items() if name != "completed_at"} | {"output": output}


@given(data=st.data(), events=EVENTS, finish_reason=st.sampled_from(["stop", "length", "tool_calls"]))
def test_a_stream_folds_to_its_last_response_and_the_whole_one(data: st.DataObject, events: list[Event], finish_reason: str) -> None:
    cuts = data.draw(st.lists(st.booleans(), min_size=len(events), max_size=len(events)))

    chunks = streamed(events, cuts, finish_reason)
    whole = shape().response([FinishedAnswer([""], merged(events), finish_reason=finish_reason)], USAGE)

    final = chunks[-1]["response"]
    assert [chunk["sequence_number"] for chunk in chunks] == list(range(len(chunks)))
    assert folded(chunks) == final["output"]
    assert without_ids(final) == without_ids(whole)
    assert chunks[-1]["type"] == f"response.{final['status']}"
    assert final["output"]
    assert ITEMS.validate_python(final["output"])  # output is input again


@given(events=EVENTS)
def test_every_text_of_the_answer_is_in_the_output_once(events: list[Event]) -> None:
    writer = OutputWriter()

    writer.write(events)
    writer.finish(is_cut=False)

    for kind, item_kind in ((Content, "message"), (Reasoning, "reasoning")):
        given_text = "".join(event.text for event in events if isinstance(event, kind))
        assert "".join(part["text"] for item in writer.items if item["type"] == item_kind for part in item["content"]) == given_text
    arguments = "".join(event.text for event in events if isinstance(event, ArgumentPiece))
    assert "".join(item.get("arguments", "") for item in writer.items) == arguments


def test_a_stream_that_fails_ends_with_what_it_has() -> None:
    written = shape()
    written.first_chunks(1, USAGE)
    written.chunks(Delta(0, "", None, None, [Content("Hel")]))

    failed = written.error_chunk(ApiError(503, "engine_unavailable", "the engine process ended"), USAGE)

    assert failed["type"] == "response.failed"
    response = failed["response"]
    assert response["error"]["code"] == "server_error"
    assert (response["status"], response["output"][0]["status"], response["output_text"]) == ("failed", "incomplete", "Hel")
    assert response["usage"]["output_tokens"] == USAGE.completion_tokens


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StoreFullError(), "server_error"),
        (StoreError("gone"), "server_error"),
        (ValueError(), "server_error"),
        (QueueFullError("full", retry_after_s=1), "rate_limit_exceeded"),
        (InvalidRequestError("max_tokens: no"), "invalid_prompt"),
    ],
)
def test_what_is_not_the_clients_fault_is_not_called_an_invalid_prompt(error: Exception, code: str) -> None:
    assert shape().error_chunk(to_api_error(error), USAGE)["response"]["error"]["code"] == code


def test_a_call_that_has_ended_stays_complete_in_a_failed_response() -> None:
    written = shape()
    written.chunks(Delta(0, "", None, "tool_calls", [CallBegun("look"), ArgumentPiece("{}"), CallEnded(True)]))
    written.finish(USAGE)

    failed = written.error_chunk(to_api_error(StoreFullError()), USAGE)

    assert [item["status"] for item in failed["response"]["output"]] == ["completed"]


def placed(pieces: list[str]) -> TokenTexts:
    """A token for each of the pieces of an answer."""
    tokens = TokenTexts()
    starts = [0, *itertools.accumulate(map(len, pieces))]
    tokens.add([{"bytes": list(piece.encode())} for piece in pieces], starts[: len(pieces)])
    return tokens


def taken(tokens: TokenTexts, begin: int, end: int) -> str:
    return b"".join(bytes(entry["bytes"]) for entry in tokens.take(begin, end)).decode()


@given(pieces=st.lists(st.text(min_size=1, max_size=3), max_size=6), cuts=st.lists(st.integers(1, 5), max_size=10))
def test_of_text_alone_every_token_is_taken_once(pieces: list[str], cuts: list[int]) -> None:
    tokens = placed(pieces)
    places = [0, *itertools.accumulate(cuts), len("".join(pieces)) + sum(cuts)]

    taken_texts = [taken(tokens, begin, end) for begin, end in itertools.pairwise(places)]

    assert "".join(taken_texts) == "".join(pieces)


def test_tokens_of_markers_and_blanks_belong_to_nothing() -> None:
    tokens = placed(["<think>", "\n", "th", "ink", "</think>", "\n\n", "th", "e", " end"])

    assert taken(tokens, 8, 13) == "think"
    assert taken(tokens, 23, 26) == "the"
    assert taken(tokens, 26, 30) == " end"


def test_a_token_that_begins_with_a_blank_the_text_lacks_is_the_texts() -> None:
    assert taken(placed(["\n", " Hel", "lo"]), 2, 7) == " Hello"


def test_a_marker_is_not_taken_for_a_token_that_comes_after_its_text() -> None:
    assert taken(placed(["</think>", "\n"]), 9, 12) == ""


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
TEXTS_OF_ANSWERS = ("<think>", "</think>", "\n", " \n", CALL, "tall </", "<tool_call>\n{", "é", "\ufffd", "{e}")
ANSWER_PARTS = [*map(str.encode, TEXTS_OF_ANSWERS), b"\xff", b"\xe4\xbd"]


def scripted(random: Random) -> list[int]:
    """An answer's tokens: markers, calls, bytes that are no character, hidden tokens, and pieces whose borders cut characters."""
    parts = [*map(list, ANSWER_PARTS), [BOS], [random.randrange(FIRST_PIECE, VOCAB_SIZE)]]
    return [token_id for _ in range(random.randrange(1, 8)) for token_id in random.choice(parts)]


def answered(token_ids: list[int], *, group: int, stops: Sequence[str] = ()) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The output of a stream and of a whole response, without ids; the engine's steps have `group` tokens."""
    parser = AnswerParser(
        reasoning=ReasoningReader(REASONING_FORMATS["think"], is_open=False), calls=CallReader(TOOL_FORMATS["hermes"].read, ["f"])
    )
    answer = Answer(0, SamplingParams(logprobs=0), Detokenizer(ByteTokenizer(), stops=stops), includes_stop=False, parser=parser)
    streamed, whole, finished = shape(), shape(), FinishedAnswer()
    for start in range(0, len(token_ids), group):
        ids = token_ids[start : start + group]
        reason = FinishReason.LENGTH if start + group >= len(token_ids) else None
        logprobs = [TokenLogprobs(token_id, -1.0, 1) for token_id in ids]
        delta = answer.take(StepOutput(request_id="x", token_ids=ids, logprobs=logprobs, finish_reason=reason))
        if delta is not None:
            finished.add(delta)
            streamed.chunks(delta)
        if answer.finish_reason is not None:
            break
    responses = streamed.finish(USAGE), whole.response([finished], USAGE)
    stream_output, whole_output = (without_ids(response)["output"] for response in responses)
    return stream_output, whole_output


def messages(output: list[dict[str, Any]]) -> list[tuple[str, bytes]]:
    """Each with the bytes of its tokens."""
    parts = [part for item in output if item["type"] == "message" for part in item["content"]]
    return [(part["text"], b"".join(bytes(entry["bytes"]) for entry in part["logprobs"])) for part in parts]


@pytest.mark.parametrize("seed", range(300))
def test_a_whole_answers_logprobs_are_its_streams(seed: int) -> None:
    random = Random(seed)
    token_ids, stops = scripted(random), random.choice([(), ("ll", "é<")])

    streamed, whole = answered(token_ids, group=1, stops=stops)

    assert streamed == whole
    assert answered(token_ids, group=random.choice([2, 7, 1000]), stops=stops) == (whole, whole)
    if all(token_id < BOS for token_id in token_ids):
        assert all(data.decode("utf-8", "replace") == text for text, data in messages(whole))


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ([*b"<think>hm\xff ok</think>Yes"], [("Yes", b"Yes")]),
        ([*b"<think>hm", BOS, *b" ok</think>Yes"], [("Yes", b"Yes")]),
        ([*b"<think>hm</think>think <b>"], [("think <b>", b"think <b>")]),  # as a marker's letters
        ([*b"Yes\xff.", *CALL.encode()], [("Yes\ufffd.", b"Yes\xff.")]),
        ([*CALL.encode(), *b'{"a"'], [('{"a"', b'{"a"')]),
        ([*b"Yes", BOS, *b" no"], [("Yes no", b"Yes<s> no")]),
    ],
)
def test_tokens_are_those_of_the_messages_text(token_ids: list[int], expected: list[tuple[str, bytes]]) -> None:
    streamed, whole = answered(token_ids, group=1)

    assert messages(streamed) == messages(whole) == expected


def test_a_token_that_came_after_its_text_is_in_its_message() -> None:
    """It ended in what might have been, and was, the beginning of a stop string."""
    token_ids = [*b"A", FIRST_PIECE, *b"!"]

    streamed, whole = answered(token_ids, group=1, stops=("he!",))

    assert messages(streamed) == messages(whole) == [("A t", b"A the")]
