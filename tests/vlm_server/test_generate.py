"""`/generate` over a scripted engine: text or token ids in, text and token ids out."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from engine.request import PromptTooLongError, SamplingParams
from tests.contract.fake_engine import TOKENS_PER_IMAGE
from tests.contract.running import RunningServer, fake_config, running_server
from tests.vlm_server.byte_tokenizer import EOS, IMAGE
from vlm_server.examples import RED_CIRCLE


def post(server: RunningServer, **fields: Any) -> requests.Response:
    body = fields if "input_ids" in fields or "prompt" in fields else {"prompt": "hi", **fields}
    return requests.post(f"{server.url}/generate", json=body, timeout=10)


def pieces_of(response: requests.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_an_answer_has_its_text_its_tokens_and_what_it_cost(server: RunningServer) -> None:
    server.backend.engine.script = lambda prompt, params: [*b"ok", EOS]

    assert post(server).json() == {
        "text": "ok",
        "output_ids": [*b"ok", EOS],
        "meta_info": {
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "finish_reason": {"type": "stop"},
            "output_token_logprobs": None,
            "routed_experts": None,
        },
    }


def test_token_ids_go_to_the_engine_as_they_are_and_128_tokens_come_back_at_most(server: RunningServer) -> None:
    answer = post(server, input_ids=[5, 97, 6], ignore_eos=True).json()

    [(prompt, params)] = server.backend.engine.requests
    assert (list(prompt.token_ids), params.max_tokens) == ([5, 97, 6], 128)
    assert len(answer["output_ids"]) == answer["meta_info"]["completion_tokens"] == 128
    assert answer["meta_info"]["finish_reason"] == {"type": "length"}


@pytest.mark.parametrize("stream", [False, True])
def test_every_token_has_its_log_probability(server: RunningServer, stream: bool) -> None:
    server.backend.engine.script = lambda prompt, params: [*"é!".encode(), EOS]
    server.backend.engine.logprob_of = lambda token_id: float("-inf") if token_id == EOS else -token_id / 128

    response = post(server, return_logprob=True, stream=stream)

    pieces = pieces_of(response) if stream else [response.json()]
    scored = [pair for piece in pieces for pair in piece["meta_info"]["output_token_logprobs"]]
    assert scored == [[-0xC3 / 128, 0xC3], [-0xA9 / 128, 0xA9], [-33 / 128, 33], [-9999.0, EOS]]


@pytest.mark.parametrize("group", [1, 2, 5])
def test_a_stream_has_what_is_new_in_each_piece(server: RunningServer, group: int) -> None:
    server.backend.engine.script = lambda prompt, params: [*"aé🌍 b".encode(), EOS]
    server.backend.engine.group = group
    whole = post(server).json()

    pieces = pieces_of(post(server, stream=True))

    assert "".join(piece["text"] for piece in pieces) == whole["text"] == "aé🌍 b"
    assert [token_id for piece in pieces for token_id in piece["output_ids"]] == whole["output_ids"]
    assert pieces[-1]["meta_info"] == whole["meta_info"]
    assert all(piece["meta_info"]["finish_reason"] is None for piece in pieces[:-1])


def test_a_stop_string_ends_the_text_and_its_tokens_are_among_the_ids(server: RunningServer) -> None:
    server.backend.engine.script = lambda prompt, params: [*b"one STOP two", EOS]

    answer = post(server, stop="STOP").json()
    with_stop = post(server, stop=["STOP"], include_stop_str_in_output=True).json()
    by_token = post(server, stop_token_ids=[ord("e")]).json()

    assert (answer["text"], bytes(answer["output_ids"])) == ("one ", b"one STOP")
    assert with_stop["text"] == "one STOP"
    assert (by_token["text"], by_token["meta_info"]["finish_reason"]) == ("on", {"type": "stop"})


def test_the_sampling_fields_reach_the_engine(server: RunningServer) -> None:
    fields = {"temperature": 0.5, "top_p": 0.75, "top_k": 7, "min_p": 0.25, "repetition_penalty": 1.5, "seed": 11, "max_tokens": 9}

    post(server, **fields, min_new_tokens=2, model=server.model)

    assert server.backend.engine.requests[-1][1] == SamplingParams(**fields, min_tokens=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("image_data", [RED_CIRCLE, {"url": RED_CIRCLE, "detail": "low"}, [RED_CIRCLE], [{"url": RED_CIRCLE}]])
@pytest.mark.parametrize("given", [{"prompt": "hi"}, {"input_ids": [104, 105]}], ids=str)
def test_a_picture_comes_with_a_text_or_token_ids(server: RunningServer, given: dict[str, Any], image_data: Any) -> None:
    answer = post(server, **given, image_data=image_data).json()

    [(prompt, _)] = server.backend.engine.requests
    assert list(prompt.token_ids) == [IMAGE] * TOKENS_PER_IMAGE + [104, 105]
    assert answer["meta_info"]["prompt_tokens"] == TOKENS_PER_IMAGE + 2


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "input_ids"),
    ({"prompt": "a", "input_ids": [1]}, "input_ids"),
    ({"prompt": ""}, "prompt"),
    ({"input_ids": []}, "input_ids"),
    ({"input_ids": [-1]}, "input_ids[0]"),
    ({"input_ids": [1, 2**31 - 1]}, "input_ids"),
    ({"input_ids": [1, 2**31 - 1], "image_data": RED_CIRCLE}, "input_ids"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"n": 2}, "n"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"image_data": 5}, "image_data"),
    ({"image_data": "bad"}, "image_data"),
    ({"image_data": [RED_CIRCLE, {"url": "bad"}]}, "image_data[1]"),
    ({"image_data": [{"detail": "low"}]}, "image_data[0].url"),
    ({"return_routed_experts": True}, "return_routed_experts"),
    ({"repetition_ngram_size": 2}, "repetition_ngram_size"),
    ({"repetition_ngram_threshold": 2}, "repetition_ngram_threshold"),
    ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
    ({"media_io_kwargs": {"image": {}}}, "media_io_kwargs"),
    ({"mm_processor_kwargs": {"image": {}}}, "mm_processor_kwargs"),
    ({"logprobs": 2}, "logprobs"),
    ({"sampling_params": {"temperature": 0}}, "sampling_params"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[str(fields)[:60] for fields, _ in REFUSED])
def test_what_cannot_be_had_is_refused_by_name(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    response = post(server, **fields)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not server.backend.engine.requests


def test_nulls_and_no_ops_are_accepted_without_a_warning(server: RunningServer) -> None:
    no_ops = {"return_routed_experts": False, "repetition_ngram_size": 0, "repetition_ngram_threshold": 0, "image_data": []}
    more = {"spaces_between_special_tokens": True, "media_io_kwargs": None, "stream_options": None, "session_id": -1, "n": 1}

    answer = post(server, prompt="hi", input_ids=None, **no_ops, **more)

    assert answer.status_code == 200
    assert "warnings" not in answer.json()
    assert post(server, odd=1).json()["warnings"] == ["odd: no API documents this field; it has no effect"]


@pytest.mark.parametrize("given", [{"prompt": "a"}, {"input_ids": [97]}], ids=str)
def test_what_the_engine_refuses_names_the_field_that_was_sent(server: RunningServer, given: dict[str, Any]) -> None:
    server.backend.engine.refusal = PromptTooLongError(600, 512)

    error = post(server, **given).json()["error"]

    assert (error["code"], error["param"]) == ("context_length_exceeded", next(iter(given)))


def test_an_unknown_model_is_not_found(server: RunningServer) -> None:
    assert post(server, model="other").status_code == 404


def test_it_is_aborted_by_its_session() -> None:
    with running_server(fake_config(enable_abort_handling=True)) as server, ThreadPoolExecutor(1) as threads:
        server.backend.engine.hangs_after = 3
        running = threads.submit(post, server, session_id=4, stream=True)
        assert server.backend.activity.has_begun_within(5)

        assert requests.post(f"{server.url}/abort_request", json={"session_id": 4}, timeout=10).status_code == 200

        last = pieces_of(running.result(10))[-1]
        assert last["meta_info"]["finish_reason"] == {"type": "abort"}
        assert server.backend.activity.was_left_within(1)
