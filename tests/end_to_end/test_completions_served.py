"""Echo, candidates, beams, `/generate` and aborts of a real server, against the reference's log-probabilities."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from transformers import AutoModelForCausalLM

from tests.end_to_end.test_families_served import QUESTION, messages, png
from tests.image_fixtures import reference_processor, tiny_folder
from tests.server_process import ServerProcess, data_url, server_process
from tests.tiny_models import write_tiny

TOLERANCE = 1e-4
TEXT = "The quick brown fox jumps over the lazy dog. 你好！"
IDS = list(range(20, 90))
GREEDY = {"temperature": 0, "ignore_eos": True}

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    with server_process(folder, "--model-name", "tiny", "--enable-abort-handling", "--max-prefill-token-num", "32") as server:
        yield server


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logprobs(token_ids: list[int]) -> torch.Tensor:
        """Of each token but the first: (num_tokens - 1,)."""
        with torch.inference_mode():
            scores = model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
        return scores[range(len(token_ids) - 1), token_ids[1:]]

    return logprobs


def post(server: ServerProcess, path: str, **fields: Any) -> requests.Response:
    return requests.post(f"{server.url}{path}", json=fields, timeout=60)


def complete(server: ServerProcess, **fields: Any) -> requests.Response:
    return post(server, "/v1/completions", **{"model": "tiny", "max_tokens": 5, **fields})


def assert_close(ours: list[float], theirs: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(ours), theirs, atol=TOLERANCE, rtol=0)


def test_echoed_log_probabilities_are_the_references(server: ServerProcess, reference: Any) -> None:
    text_ids = post(server, "/tokenize", prompt=TEXT).json()["tokens"]
    for prompt, prompt_ids in ((TEXT, [text_ids]), ([IDS, text_ids, IDS[:1]], [IDS, text_ids, IDS[:1]])):
        for n in (1, 2):
            choices = complete(server, prompt=prompt, echo=True, logprobs=1, max_tokens=0, n=n).json()["choices"]

            assert len(choices) == n * len(prompt_ids)
            for choice in choices:
                token_ids = prompt_ids[choice["index"] // n]
                none, *logprobs = choice["logprobs"]["token_logprobs"]
                assert none is None
                assert_close(logprobs, reference(token_ids))


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_and_answer_are_scored_as_one_text(server: ServerProcess, reference: Any, stream: bool) -> None:
    answer_ids = post(server, "/generate", input_ids=IDS, max_tokens=5, **GREEDY).json()["output_ids"]

    response = complete(server, prompt=IDS, echo=True, logprobs=0, stream=stream, **GREEDY)

    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")] if stream else [response.json()]
    pieces = [event["choices"][0] for event in events]
    logprobs = [value for piece in pieces if piece["logprobs"] for value in piece["logprobs"]["token_logprobs"]]
    assert_close(logprobs[1:], reference([*IDS, *answer_ids]))
    assert "".join(piece["text"] for piece in pieces).startswith(post(server, "/detokenize", tokens=IDS).json()["prompt"].rstrip("\ufffd"))


def test_generated_tokens_have_the_references_log_probabilities(server: ServerProcess, reference: Any) -> None:
    fields = {"input_ids": IDS, "max_tokens": 8, "seed": 3, "ignore_eos": True}

    answer = post(server, "/generate", **fields, return_logprob=True).json()

    assert [token_id for _, token_id in answer["meta_info"]["output_token_logprobs"]] == answer["output_ids"]
    theirs = reference([*IDS, *answer["output_ids"]])[len(IDS) - 1 :]
    assert_close([logprob for logprob, _ in answer["meta_info"]["output_token_logprobs"]], theirs)


def test_the_best_candidate_is_the_one_with_the_highest_mean(server: ServerProcess) -> None:
    fields = {"prompt": IDS, "seed": 5, "ignore_eos": True, "temperature": 1}
    candidates = complete(server, **fields, n=4, logprobs=0).json()["choices"]
    means = [sum(choice["logprobs"]["token_logprobs"]) / 5 for choice in candidates]

    best, second = complete(server, **fields, n=2, best_of=4).json()["choices"]

    ranked = sorted(range(4), key=lambda index: -means[index])
    assert [best["text"], second["text"]] == [candidates[index]["text"] for index in ranked[:2]]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"echo": True}, 200),
        ({"n": 2}, 400),
        ({"best_of": 2}, 400),
        ({"logprobs": 0}, 400),
        ({"echo": True, "logprobs": 0}, 400),
        ({"echo": True, "max_tokens": 0}, 400),
        ({"structured_outputs": {"choice": ["a", "b"]}}, 400),
        ({"response_format": {"type": "json_object"}}, 400),
    ],
    ids=str,
)
def test_beams_work_with_a_field_or_refuse_it_by_name(server: ServerProcess, fields: dict[str, Any], status: int) -> None:
    beams = complete(server, prompt=TEXT, num_beams=2, **fields)

    assert beams.status_code == status
    if status == 200:
        assert beams.json()["choices"][0]["text"] == TEXT + complete(server, prompt=TEXT, num_beams=2).json()["choices"][0]["text"]
    else:
        assert beams.json()["error"]["param"] in ("num_beams", "best_of")


@pytest.mark.parametrize("fields", [{"n": 1}, {"n": 3}, {"num_beams": 2}], ids=str)
def test_an_aborted_request_answers_and_gives_its_blocks_back(server: ServerProcess, fields: dict[str, Any]) -> None:
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(complete, server, prompt=IDS, max_tokens=3500, stream=True, session_id=3, **GREEDY, **fields)
        wait_until(server, "vlm:num_requests_running", lambda number: number > 0)

        assert post(server, "/abort_request", session_id=3).status_code == 200

        lines = [line for line in running.result(60).text.splitlines() if line.startswith("data: {")]
    assert json.loads(lines[-1][6:])["choices"][0]["finish_reason"] == "abort"
    wait_until(server, "vlm:num_referenced_blocks", lambda number: number == 0)


def wait_until(server: ServerProcess, metric: str, is_met: Callable[[float], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not is_met(server.metric(metric)):
        assert time.monotonic() < deadline_s, f"{metric} is {server.metric(metric)}"


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_pictures_of_generate_are_seen_as_those_of_a_chat(name: str) -> None:
    url, content = data_url(png()), [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = reference_processor(name).apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    with server_process(tiny_folder(name), "--model-name", "tiny", "--session-len", "1024") as server:
        chat_messages = messages({"type": "image_url", "image_url": {"url": url}})
        chat = post(server, "/v1/chat/completions", model="tiny", messages=chat_messages, max_tokens=8, **GREEDY).json()
        chat_ids = post(server, "/tokenize", messages=chat_messages).json()["tokens"]

        by_text = post(server, "/generate", prompt=prompt, image_data=url, max_tokens=8, **GREEDY).json()
        by_ids = post(server, "/generate", input_ids=chat_ids, image_data=[{"url": url}], max_tokens=8, **GREEDY).json()
        without = post(server, "/generate", input_ids=chat_ids, max_tokens=8)

    assert by_text["meta_info"]["prompt_tokens"] == by_ids["meta_info"]["prompt_tokens"] == chat["usage"]["prompt_tokens"]
    assert by_text["output_ids"] == by_ids["output_ids"]
    assert by_text["text"] == chat["choices"][0]["message"]["content"]
    assert (without.status_code, without.json()["error"]["param"]) == (400, "input_ids")
