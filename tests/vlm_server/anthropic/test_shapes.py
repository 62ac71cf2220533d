"""Messages of Anthropic's API on the wire: what a client puts together of the events is the whole answer."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vlm_server.anthropic.protocol import MessagesRequest
from vlm_server.anthropic.response_schema import MessageResponse, MessageStreamEvent
from vlm_server.anthropic.shapes import MessageShape, input_json
from vlm_server.errors import ApiError
from vlm_server.generation import Delta, FinishedAnswer, Usage
from vlm_server.parsing.answer import AnswerParser
from vlm_server.parsing.calls import CallReader
from vlm_server.parsing.events import ArgumentPiece, CallBegun, CallEnded, Content, Event, Reasoning
from vlm_server.parsing.reasoning import REASONING_FORMATS, ReasoningReader
from vlm_server.parsing.tool_formats import TOOL_FORMATS

USAGE = Usage(prompt_tokens=9, completion_tokens=7, cached_tokens=4, image_tokens=2, reasoning_tokens=3)
LOOK = {"name": "look", "input_schema": {"type": "object"}}


def call(arguments: str) -> str:
    return f'<tool_call>\n{{"name": "look", "arguments": {arguments}}}\n</tool_call>'


FRAGMENTS = (
    *("<think>", "</think>", "Hm, 好.", " ", "\n\n", "<tool_call>", '{"name": "look"}', "</tool_call>"),
    *(call("{}"), call('{"at": "你好 \\ud83c"}'), call('{"at": [1, {"x": null}]}')),
    *(call("{at: there}"), call('{"at": NaN}'), call('{"at": 1e999}'), call('{"at": "a\nb"}'), call('{"at": "half')[:-20]),
)


def new_shape(*, eager: bool = False, **fields: Any) -> MessageShape:
    tools = [{**LOOK, "eager_input_streaming": eager}]
    messages = [{"role": "user", "content": "Hi"}]
    request = MessagesRequest.model_validate({"model": "m", "max_tokens": 7, "messages": messages, "tools": tools, **fields})
    return MessageShape(request, response_id="msg_1", request_id="req_1", warnings=["x: no"])


def delta(events: list[Event], finish_reason: str | None = None, stop_string: str | None = None) -> Delta:
    return Delta(index=0, text="", logprobs=None, finish_reason=finish_reason, events=events, stop_string=stop_string)


def deltas_of(pieces: list[str], finish_reason: str, stop_string: str | None) -> list[Delta]:
    """As a generation gives them: none without news but the last."""
    reasoning = ReasoningReader(REASONING_FORMATS["think"], is_open=False)
    parser = AnswerParser(reasoning=reasoning, calls=CallReader(TOOL_FORMATS["hermes"].read, ["look"]))
    steps = [parser.feed(piece) for piece in pieces]
    return [*(delta(events) for events in steps if events), delta(parser.finish(), finish_reason, stop_string)]


def on_the_wire(value: Any) -> Any:
    return json.loads(msgspec.json.encode(value))


def streamed(shape: MessageShape, deltas: list[Delta]) -> list[dict[str, Any]]:
    chunks = [*shape.first_chunks(1, USAGE), *(chunk for piece in deltas for chunk in shape.chunks(piece)), *shape.last_chunks(USAGE)]
    return [on_the_wire(chunk) for chunk in chunks]


def whole(shape: MessageShape, deltas: list[Delta]) -> dict[str, Any]:
    events = [event for piece in deltas for event in piece.events]
    answer = FinishedAnswer(events=events, finish_reason=deltas[-1].finish_reason, stop_string=deltas[-1].stop_string)
    return dict(on_the_wire(shape.response([answer], USAGE)))


def folded(chunks: list[dict[str, Any]], *, eager: bool = False) -> dict[str, Any]:
    """The message that a client makes of events, after a check of their order."""
    message: dict[str, Any] = chunks[0]["message"]
    inputs: dict[int, str] = {}
    is_open = False
    for chunk in chunks[1:-2]:
        assert chunk["index"] == len(message["content"]) - (chunk["type"] != "content_block_start")
        assert is_open == (chunk["type"] != "content_block_start")
        is_open = chunk["type"] != "content_block_stop"
        match chunk:
            case {"type": "content_block_start", "content_block": block}:
                message["content"].append(block)
            case {"delta": {"type": "input_json_delta", "partial_json": text}}:
                inputs[chunk["index"]] = inputs.get(chunk["index"], "") + text
            case {"delta": delta}:
                name = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}[delta["type"]]
                message["content"][-1][name] += delta[name]
    for index, text in inputs.items():
        message["content"][index]["input"] = json.loads(input_json(text) if eager else text)
    assert not is_open
    assert [chunk["type"] for chunk in chunks[-2:]] == ["message_delta", "message_stop"]
    return {**message, **chunks[-2]["delta"], "usage": {**message["usage"], **chunks[-2]["usage"]}}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{key: value for key, value in block.items() if key != "id"} for block in message["content"]]}


answers = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)
endings = st.sampled_from([("stop", None), ("stop", "own"), ("stop", "theirs"), ("length", None), ("tool_calls", None)])


@given(answers, st.lists(st.integers(1, 40), max_size=12), endings, st.booleans(), st.sampled_from(["summarized", "omitted"]))
@example(call('{"at": "here"}') * 2, [1] * 80, ("tool_calls", None), False, "summarized")
def test_what_a_client_makes_of_any_stream_is_the_whole_answer(
    text: str, sizes: list[int], ending: tuple[str, str | None], eager: bool, display: str
) -> None:
    starts = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
    deltas = deltas_of([text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)], *ending)
    fields = {"eager": eager, "stop_sequences": ["own"], "thinking": {"type": "adaptive", "display": display}}

    message = folded(streamed(new_shape(**fields), deltas), eager=eager)

    assert without_ids(message) == without_ids(whole(new_shape(**fields), deltas))


@given(answers, endings)
def test_answers_have_the_shape_that_the_document_states(text: str, ending: tuple[str, str | None]) -> None:
    deltas = deltas_of(list(text), *ending)

    MessageResponse.model_validate(whole(new_shape(), deltas))
    for chunk in streamed(new_shape(), deltas):
        MessageStreamEvent.model_validate(chunk)


def blocks(*events: Event, **fields: Any) -> Any:
    return without_ids(whole(new_shape(**fields), [delta(list(events), "stop")]))["content"]


def test_blocks_come_in_the_models_order() -> None:
    said = (Reasoning("Hm."), Content("Look:"), CallBegun("look"), ArgumentPiece('{"a": 1}'), CallEnded(True), Content("and"))

    assert blocks(*said) == [
        {"type": "thinking", "thinking": "Hm.", "signature": "unsigned"},
        {"type": "text", "text": "Look:"},
        {"type": "tool_use", "name": "look", "input": {"a": 1}},
        {"type": "text", "text": "and"},
    ]
    assert blocks() == []


def test_every_call_has_its_own_input() -> None:
    calls = [event for number in "12" for event in (CallBegun("look"), ArgumentPiece(f'{{"a": {number}}}'), CallEnded(True))]

    assert [block["input"] for block in blocks(*calls)] == [{"a": 1}, {"a": 2}]


def test_thinking_can_be_omitted() -> None:
    said = blocks(Reasoning("Hm."), Content("Hi"), thinking={"type": "adaptive", "display": "omitted"})

    assert said == [{"type": "thinking", "thinking": "", "signature": "unsigned"}, {"type": "text", "text": "Hi"}]


def test_cached_tokens_are_not_among_the_input_tokens() -> None:
    usage = whole(new_shape(), [delta([], "stop")])["usage"]

    assert usage == {
        "input_tokens": 5,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens": 7,
        "output_tokens_details": {"thinking_tokens": 3},
        "service_tier": "standard",
    }


@pytest.mark.parametrize(
    ("finish", "max_tokens", "reason", "sequence"),
    [
        (("stop", None), 7, "end_turn", None),
        (("stop", "own"), 7, "stop_sequence", "own"),
        (("stop", "theirs"), 7, "end_turn", None),
        (("length", None), 7, "max_tokens", None),
        (("length", None), 8, "model_context_window_exceeded", None),
        (("tool_calls", None), 7, "tool_use", None),
        (("tool_calls", "own"), 7, "tool_use", None),
    ],
)
def test_an_end_has_anthropics_name(finish: tuple[str, str | None], max_tokens: int, reason: str, sequence: str | None) -> None:
    message = whole(new_shape(max_tokens=max_tokens, stop_sequences=["own"]), [delta([], *finish)])

    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)


@pytest.mark.parametrize("text", ['{"a": "x', "{a: 1}", "[1]", '"x"', "", '{"a": NaN}', '{"a": 1e999}', '{"a": ' * 90 + "1" + "}" * 90])
def test_what_is_no_object_is_kept_as_text_beside_the_word_for_it(text: str) -> None:
    assert json.loads(input_json(text)) == {"INVALID_JSON": text}


@pytest.mark.parametrize("text", ["{}", '{"a": "\\ud83c"}', '{"a": "a\nb"}', '{"a": 123456789012345678901234567890}', '{"a": "杭州"}'])
def test_what_is_an_object_stays_that_object(text: str) -> None:
    assert json.loads(input_json(text)) == json.loads(text, strict=False)
    assert input_json(text).isascii()


def test_an_error_within_a_stream_is_anthropics() -> None:
    chunk = new_shape().error_chunk(ApiError(503, "engine_unavailable", "the engine process ended"), USAGE)

    details = {"error_code": "engine_unavailable", "param": None}
    error = {"type": "overloaded_error", "message": "the engine process ended", "details": details}
    assert chunk == {"type": "error", "error": error, "request_id": "req_1"}
