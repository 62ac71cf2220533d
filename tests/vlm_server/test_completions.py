"""`/v1/completions` over a scripted engine: echoed prompts, their log-probabilities, candidates, and what cannot be had together."""

import json
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from engine.request import Prompt, make_cache_keys
from tests.contract.running import RunningServer
from tests.image_fixtures import tiny_folder
from tests.vlm_server.byte_tokenizer import BOS, EOS, FIRST_PIECE, VOCAB_SIZE, ByteTokenizer
from tests.vlm_server.test_detokenizer import SentencePieces
from vlm_server.detokenizer import Detokenizer
from vlm_server.echo import Echo, echo_of
from vlm_server.routes.completions import MAX_ECHOED_LOGPROBS
from vlm_server.tokenizer import TextTokenizer, load_tokenizer

THE = FIRST_PIECE  # " the"


def post(server: RunningServer, **fields: Any) -> requests.Response:
    return requests.post(f"{server.url}/v1/completions", json={"model": server.model, "prompt": "hé", **fields}, timeout=10)


def choices_of(server: RunningServer, **fields: Any) -> list[dict[str, Any]]:
    """The choices, whole or put together from a stream."""
    if not fields.get("stream"):
        choices: list[dict[str, Any]] = post(server, **fields).json()["choices"]
        return choices
    lines = post(server, **fields).text.splitlines()
    pieces = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    joined: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        known = joined.setdefault(piece["index"], {"index": piece["index"], "text": "", "logprobs": None})
        known["text"] += piece["text"]
        known["finish_reason"] = piece["finish_reason"]
        if piece["logprobs"] is not None:
            before = known["logprobs"] or {name: [] for name in piece["logprobs"]}
            known["logprobs"] = {name: before[name] + values for name, values in piece["logprobs"].items()}
    return [joined[index] for index in sorted(joined)]


def says(text: str) -> Any:
    return lambda prompt, params: [*text.encode(), EOS]


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_is_echoed_before_the_answer(server: RunningServer, stream: bool) -> None:
    server.backend.engine.script = says(" you")

    assert [choice["text"] for choice in choices_of(server, echo=True, stream=stream)] == ["hé you"]
    assert [choice["text"] for choice in choices_of(server, echo=False, stream=stream)] == [" you"]


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_with_several_answers_have_their_own_indices_and_echoes(server: RunningServer, stream: bool) -> None:
    server.backend.engine.script = lambda prompt, params: [*b"-", prompt.token_ids[0], *str(params.seed).encode(), EOS]
    prompts = [[97, 98], [99, THE, BOS]]

    choices = choices_of(server, prompt=prompts, n=2, seed=5, echo=True, logprobs=0, stream=stream)

    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["text"] for choice in choices] == ["ab-a5", "ab-a6", "c the-c5", "c the-c6"]
    assert [choice["finish_reason"] for choice in choices] == ["stop"] * 4
    assert [choice["logprobs"]["tokens"][:3] for choice in choices] == [["a", "b", "-"]] * 2 + [["c", " the", "<s>"]] * 2
    assert choices[2]["logprobs"]["text_offset"] == [0, 1, 5, 5, 6, 7]
    assert [params.prompt_logprobs for _, params in server.backend.engine.requests].count(0) == 2, "each prompt is read once"


@pytest.mark.parametrize("stream", [False, True])
def test_echoed_log_probabilities_begin_with_null_and_go_on_in_the_answer(server: RunningServer, stream: bool) -> None:
    server.backend.engine.script = says("ok")

    [choice] = choices_of(server, echo=True, logprobs=1, stream=stream)

    assert choice["text"] == "héok"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa9", "o", "k"]
    assert logprobs["token_logprobs"] == [None, -1.5, -1.5, -1.5, -1.5]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][3] == {"x": -0.25, "o": -1.5}
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_a_long_echoed_prompt_is_written_once_for_all_choices_beside_the_event_loop(
    server: RunningServer, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: it was written once for each choice, on the loop, which stood still for seconds."""
    server.backend.engine.script = says("ok")
    threads: list[str] = []
    write = Echo.logprobs

    def recorded(echo: Echo, *given: Any) -> dict[str, list[object]]:
        threads.append(threading.current_thread().name)
        return write(echo, *given)

    monkeypatch.setattr(Echo, "logprobs", recorded)
    choices = choices_of(server, prompt=["a" * 300, "b" * 300], echo=True, logprobs=1, n=3, stream=stream)

    assert [choice["logprobs"]["tokens"] for choice in choices] == [[*letter * 300, "o", "k"] for letter in "aaabbb"]
    assert [name.startswith("asyncio_") for name in threads] == [True, True]


@pytest.mark.parametrize(
    "fields", [{"n": 128}, {"best_of": 8, "n": 8, "prompt": [[65] * 7000] * 16}, {"prompt": [[65] * 8000] * 16}], ids=str
)
def test_echoed_log_probabilities_out_of_proportion_are_refused(server: RunningServer, fields: dict[str, Any]) -> None:
    response = post(server, **{"prompt": [65] * 4000, "echo": True, "logprobs": 20, "max_tokens": 1, **fields})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "logprobs"
    assert f"at most {MAX_ECHOED_LOGPROBS} are allowed" in response.json()["error"]["message"]
    assert not server.backend.engine.requests


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0])
def test_a_prompt_is_scored_without_an_answer(server: RunningServer, stream: bool, logprobs: int | None) -> None:
    [choice] = choices_of(server, echo=True, max_tokens=0, logprobs=logprobs, stream=stream)

    assert (choice["text"], choice["finish_reason"]) == ("hé", "length")
    assert (choice["logprobs"] or {}).get("token_logprobs") == (None if logprobs is None else [None, -1.5, -1.5])
    [(_, params)] = server.backend.engine.requests
    assert (params.max_tokens, params.prompt_logprobs) == (0, logprobs)


def test_a_scored_prompt_costs_no_completion_tokens(server: RunningServer) -> None:
    usage = post(server, echo=True, max_tokens=0, logprobs=0).json()["usage"]

    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 0)


def test_streamed_offsets_are_those_of_the_whole_answer_where_text_is_held_back(server: RunningServer) -> None:
    server.backend.engine.script = lambda prompt, params: [*b"aSTO", THE, *b"b", EOS]
    fields = {"logprobs": 0, "stop": ["STOP"], "echo": True}

    [whole], [streamed] = (choices_of(server, **fields, stream=stream) for stream in (False, True))

    assert whole == streamed
    assert whole["logprobs"]["text_offset"] == [0, 1, 1, 2, 3, 4, 5, 6, 10]


def test_the_best_of_several_answers_come_best_first_and_all_are_counted(server: RunningServer) -> None:
    server.backend.engine.script = lambda prompt, params: [*b"abcd"[(params.seed or 0) :], EOS]
    server.backend.engine.logprob_of = lambda token_id: {ord("b"): -0.5, ord("d"): -3.0}.get(token_id, -1.0)

    body = post(server, prompt=["x", "y"], best_of=4, n=2, seed=0, logprobs=None).json()

    # Means: abcd -1.3, bcd -1.375, cd -1.667, d -2
    assert [choice["text"] for choice in body["choices"]] == ["abcd", "bcd"] * 2
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in body["choices"])
    assert body["usage"]["completion_tokens"] == 2 * (5 + 4 + 3 + 2)
    assert body["usage"]["prompt_tokens"] == 2


def test_a_shorter_answer_wins_where_its_tokens_are_likelier(server: RunningServer) -> None:
    server.backend.engine.script = lambda prompt, params: [*b"abcd"[(params.seed or 0) :], EOS]
    server.backend.engine.logprob_of = lambda token_id: {ord("d"): -0.5, EOS: -0.1}.get(token_id, -4.0)

    [choice] = choices_of(server, best_of=4, seed=0, logprobs=0, echo=True)

    assert choice["text"] == "héd"
    assert choice["logprobs"]["token_logprobs"] == [None, -4.0, -4.0, -0.5]


def test_as_many_candidates_as_answers_are_all_returned_in_order(server: RunningServer) -> None:
    assert [choice["text"] for choice in choices_of(server, best_of=2, n=2, seed=1)] == ["seed 1", "seed 2"]
    assert len(choices_of(server, best_of=1, stream=True)) == 1
    assert all(params.logprobs is None for _, params in server.backend.engine.requests)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1, "echo": True}, "max_tokens"),
    ({"echo": "maybe"}, "echo"),
    ({"best_of": 0}, "best_of"),
    ({"best_of": 129}, "best_of"),
    ({"best_of": 2, "n": 3}, "best_of"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"best_of": 2, "num_beams": 2}, "best_of"),
    ({"n": 2, "num_beams": 2}, "num_beams"),
    ({"logprobs": 21}, "logprobs"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=str)
def test_what_cannot_be_had_is_refused_by_name(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    response = post(server, **fields)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not server.backend.engine.requests


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20))
def test_offsets_never_go_back_and_stay_within_the_text(token_ids: list[int]) -> None:
    echo = echo_of(token_ids, _prompt(token_ids), ByteTokenizer(), skip_special_tokens=True)

    offsets = echo.logprobs([], ByteTokenizer())["text_offset"]

    assert offsets == sorted(offsets)
    assert 0 <= offsets[0] <= offsets[-1] <= len(echo.text)


@given(st.text(max_size=30))
def test_the_offsets_of_a_text_cut_it_into_its_tokens(text: str) -> None:
    tokenizer = ByteTokenizer()
    token_ids = tokenizer.encode(text, add_special_tokens=True)

    offsets = Echo(text, tuple(token_ids)).logprobs([], tokenizer)["text_offset"]

    whole = [len(text.encode()[:place].decode("utf-8", "ignore")) for place in range(len(text.encode()))]
    assert offsets == [0, *whole]


def test_a_first_token_and_a_space_that_the_tokenizer_puts_before_a_text_have_no_length() -> None:
    written = Echo("the the", (BOS, THE, THE)).logprobs([], ByteTokenizer())

    assert written["text_offset"] == [0, 0, 3]


def test_a_real_tokenizers_first_token_has_no_length() -> None:
    tokenizer = internlm2()
    token_ids = tokenizer.encode("The lazy dog", add_special_tokens=True)

    offsets = Echo("The lazy dog", tuple(token_ids)).logprobs([], tokenizer)["text_offset"]

    assert token_ids[0] == tokenizer.token_id("<s>")
    assert offsets == [0, *(len(tokenizer.decode(token_ids[:place])) for place in range(1, len(token_ids)))]


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=8), st.text(max_size=20))
def test_what_stands_before_an_answer_is_not_given_again(before: list[int], text: str) -> None:
    detokenizer = Detokenizer(ByteTokenizer(), before=[*before, ord("|")])

    given_text = "".join(detokenizer.add(byte) for byte in text.encode()) + detokenizer.finish()

    assert given_text == text


def test_an_answer_goes_on_with_the_space_that_its_first_token_begins_with() -> None:
    decoder = SentencePieces()  # writes no space at the beginning of what it is given
    before, after = decoder.pieces("a the"), decoder.pieces(" a")
    detokenizer = Detokenizer(decoder, before=before)

    text = "".join(detokenizer.add(token_id) for token_id in after) + detokenizer.finish()

    assert (decoder.decode(after), text) == ("a", " a")


def internlm2() -> TextTokenizer:
    return TextTokenizer(load_tokenizer(tiny_folder("internlm2")))


def _prompt(token_ids: Sequence[int]) -> Prompt:
    return Prompt(token_ids=tuple(token_ids), cache_keys=make_cache_keys(token_ids, (), ()))


@pytest.mark.parametrize(
    "fields", [{"prompt": [1, VOCAB_SIZE]}, {"prompt": [[1], [VOCAB_SIZE]]}, {"prompt": [VOCAB_SIZE], "echo": True}], ids=str
)
def test_a_token_that_is_not_there_is_refused_before_anything_is_decoded(server: RunningServer, fields: dict[str, Any]) -> None:
    answer = requests.post(f"{server.url}/v1/completions", json={"model": server.model, **fields}, timeout=10)

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert f"outside 0 … {VOCAB_SIZE - 1}" in answer.json()["error"]["message"]
