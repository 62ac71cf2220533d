"""`--compat alpaca`: every call of Chinese-LLaMA-Alpaca's guide with the answer that it shows, and what became of what that ignored."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import requests

from tests.contract.fake_engine import HIDDEN_SIZE
from tests.contract.running import RunningServer, fake_config, running_server
from tests.vlm_server.byte_tokenizer import EOS
from vlm_server.config import ServerConfig

NAME = "chinese-llama-alpaca"
TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
STORY = {"role": "user", "message": "Tell me some stories about Hangzhou"}
TALK = [STORY, {"role": "assistant", "message": "Gladly."}, {"role": "user", "message": "The West Lake, please"}]
PICTURE = {"type": "image_url", "image_url": {"url": "http://host/picture.png"}}


def config(**changes: Any) -> ServerConfig:
    return fake_config(compat="alpaca", model_name=NAME, **changes)


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RunningServer]:
    with running_server(config()) as server:
        yield server


def post(server: RunningServer, path: str, **fields: Any) -> dict[str, Any]:
    response = requests.post(f"{server.url}/v1/{path}", json=fields, timeout=10)
    assert response.status_code == 200, response.text
    return response.json()  # type: ignore[no-any-return]


def refused(server: RunningServer, path: str, **fields: Any) -> dict[str, Any]:
    response = requests.post(f"{server.url}/v1/{path}", json=fields, timeout=10)
    assert response.status_code == 400, response.text
    return response.json()["error"]  # type: ignore[no-any-return]


def events(server: RunningServer, path: str, *, timeout_s: float = 10, **fields: Any) -> list[dict[str, Any]]:
    response = requests.post(f"{server.url}/v1/{path}", json={"stream": True, **fields}, timeout=timeout_s)
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def answering(server: RunningServer, text: str) -> None:
    server.backend.engine.script = lambda prompt, params: [*text.encode(), EOS]


def prompt_of(server: RunningServer) -> str:
    [(prompt, _)] = server.backend.engine.requests
    return bytes(prompt.token_ids).decode()


def sampled_with(server: RunningServer, *names: str) -> list[Any]:
    return [getattr(server.backend.engine.requests[-1][1], name) for name in names]


SAMPLING = ("temperature", "top_p", "top_k", "max_tokens", "repetition_penalty", "num_beams")


def test_a_completion_without_a_model(server: RunningServer) -> None:
    answering(server, " The capital of China is Beijing.\n")

    answer = post(server, "completions", prompt="Tell me where the capital of China is")

    assert answer.pop("id").startswith("cmpl-")
    assert isinstance(answer.pop("created"), int)
    text = "The capital of China is Beijing."
    assert answer == {"object": "text_completion", "model": NAME, "choices": [{"index": 0, "text": text}]}
    assert prompt_of(server) == f"{TASK}\n    \n### Instruction:\nTell me where the capital of China is\n\n### Response: "
    assert sampled_with(server, *SAMPLING) == [0.1, 0.75, 40, 128, 1.0, 1]


def test_a_completion_with_beams(server: RunningServer) -> None:
    answering(server, "Both have.")
    prompt = "Tell me the strengths and weaknesses of China and the United States respectively"

    answer = post(server, "completions", prompt=prompt, max_tokens=90, temperature=0.7, num_beams=4, top_k=40)

    assert set(answer) == {"id", "object", "created", "model", "choices"}
    assert answer["choices"] == [{"index": 0, "text": "Both have."}]
    assert sampled_with(server, *SAMPLING) == [0.7, 0.75, 40, 90, 1.0, 4]


def test_a_chat_comes_back_with_the_answer_last(server: RunningServer) -> None:
    answering(server, "Once upon a time.")

    answer = post(server, "chat/completions", messages=[STORY], repetition_penalty=1.0)

    assert answer.pop("id").startswith("chatcmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "chat.completion",
        "model": NAME,
        "choices": [
            {"index": 0, "message": {"role": "user", "content": "Tell me some stories about Hangzhou"}},
            {"index": 1, "message": {"role": "assistant", "content": "Once upon a time."}},
        ],
    }
    assert prompt_of(server) == f"{TASK}\n\n### Instruction:\nTell me some stories about Hangzhou\n\n### Response: "
    assert sampled_with(server, *SAMPLING) == [0.7, 1.0, 40, 128, 1.0, 1]


def test_a_chat_of_three_turns_has_its_answer_at_index_3(server: RunningServer) -> None:
    answering(server, "It is a lake.")

    answer = post(server, "chat/completions", messages=TALK, repetition_penalty=1.0)

    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["choices"][1] == {"index": 1, "message": {"role": "assistant", "content": "Gladly."}}
    assert answer["choices"][3] == {"index": 3, "message": {"role": "assistant", "content": "It is a lake."}}


def test_an_embedding_of_one_text_is_a_vector(server: RunningServer) -> None:
    answer = post(server, "embeddings", input="The weather is really nice today")

    [item] = answer["data"]
    assert len(item["embedding"]) == HIDDEN_SIZE
    assert np.linalg.norm(item["embedding"]) == pytest.approx(1, abs=1e-6)
    assert answer == {"object": "list", "data": [{"object": "embedding", "embedding": item["embedding"], "index": 0}], "model": NAME}


def test_embeddings_of_several_texts_are_one_item_with_a_list_of_vectors(server: RunningServer) -> None:
    [item] = post(server, "embeddings", input=["ab", "c"])["data"]

    assert np.shape(item["embedding"]) == (2, HIDDEN_SIZE)
    assert item["embedding"][1] == post(server, "embeddings", input="c")["data"][0]["embedding"]
    assert item["embedding"][1] == post(server, "embeddings", input=["c"])["data"][0]["embedding"]


@pytest.mark.parametrize("model", [None, NAME, "gpt-3.5-turbo"])
def test_any_model_may_be_named_and_the_servers_name_comes_back(server: RunningServer, model: str | None) -> None:
    for path, fields in (("chat/completions", {"messages": [STORY]}), ("completions", {"prompt": "x"}), ("embeddings", {"input": "x"})):
        assert post(server, path, model=model, **fields)["model"] == NAME


def test_a_string_is_one_user_message(server: RunningServer) -> None:
    answer = post(server, "chat/completions", messages="Hi")

    assert prompt_of(server) == f"{TASK}\n\n### Instruction:\nHi\n\n### Response: "
    assert [choice["message"]["role"] for choice in answer["choices"]] == ["user", "assistant"]


def test_a_system_text_replaces_the_task_and_is_repeated_among_the_choices(server: RunningServer) -> None:
    answer = post(server, "chat/completions", messages=[{"role": "system", "message": "Be brief."}, STORY])

    assert prompt_of(server) == "Be brief.\n\n### Instruction:\nTell me some stories about Hangzhou\n\n### Response: "
    assert answer["choices"][0]["message"] == {"role": "system", "content": "Be brief."}
    assert len(answer["choices"]) == 3


def test_a_role_without_words_is_left_out_of_the_prompt_with_a_warning_and_comes_back(server: RunningServer) -> None:
    answer = post(server, "chat/completions", messages=[STORY, {"role": "narrator", "message": "It rains."}])

    assert "rains" not in prompt_of(server)
    assert answer["choices"][1]["message"] == {"role": "narrator", "content": "It rains."}
    assert answer["warnings"] == ["messages[1].role: Alpaca's template has no words for 'narrator'; the message is not in the prompt"]


@pytest.mark.parametrize("content", ["Hi", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]])
def test_content_is_as_good_as_message(server: RunningServer, content: Any) -> None:
    answer = post(server, "chat/completions", messages=[{"role": "user", "content": content}])

    assert prompt_of(server).endswith("### Instruction:\nHi\n\n### Response: ")
    assert answer["choices"][0]["message"]["content"] == "Hi"


def test_do_sample_false_is_greedy_and_with_beams_the_best_beam(server: RunningServer) -> None:
    post(server, "chat/completions", messages=[STORY], do_sample=False)
    assert sampled_with(server, "temperature", "num_beams") == [0.0, 1]

    post(server, "completions", prompt="x", do_sample=False, num_beams=4)
    assert sampled_with(server, "temperature", "num_beams") == [0.0, 4]


def test_null_fields_are_as_good_as_absent_ones(server: RunningServer) -> None:
    post(server, "completions", prompt="x", temperature=None, top_p=None, max_tokens=None, stop=None, stream=None, n=None, do_sample=None)

    assert sampled_with(server, *SAMPLING) == [0.1, 0.75, 40, 128, 1.0, 1]


def test_stop_works(server: RunningServer) -> None:
    answering(server, "One. Two.")

    assert post(server, "completions", prompt="x", stop="Two")["choices"] == [{"index": 0, "text": "One."}]
    assert post(server, "chat/completions", messages="x", stop=["Two"])["choices"][1]["message"]["content"] == "One."


def test_what_openais_routes_know_of_generation_works_here_too(server: RunningServer) -> None:
    answering(server, "yes")

    post(server, "chat/completions", messages="x", structured_outputs={"choice": ["yes", "no"]}, min_p=0.25, logit_bias={"65": 5})
    assert sampled_with(server, "min_p", "logit_bias") == [0.25, {65: 5.0}]
    assert sampled_with(server, "grammar") != [None]

    post(server, "completions", prompt="x", max_completion_tokens=7, frequency_penalty=0.5, skip_special_tokens=False)
    assert sampled_with(server, "min_p", "frequency_penalty", "max_tokens") == [0.0, 0.5, 7]


def test_n_answers_come_one_after_the_other(server: RunningServer) -> None:
    chat = post(server, "chat/completions", messages="x", n=2, seed=5)
    completion = post(server, "completions", prompt="x", n=2, seed=5)

    assert [(choice["index"], choice["message"]["content"]) for choice in chat["choices"]] == [(0, "x"), (1, "seed 5"), (2, "seed 6")]
    assert completion["choices"] == [{"index": 0, "text": "seed 5"}, {"index": 1, "text": "seed 6"}]


def test_of_text_that_goes_on_with_another_response_only_that_is_the_answer(server: RunningServer) -> None:
    answering(server, "One.\n\n### Instruction:\nMore\n\n### Response: Two.")

    assert post(server, "completions", prompt="x")["choices"][0]["text"] == "Two."


def test_a_streamed_chat_has_the_answer_alone_under_its_own_index(server: RunningServer) -> None:
    answering(server, "  One. Two. \n")

    role, *pieces, last = events(server, "chat/completions", messages=TALK)

    assert role["object"] == "chat.completion.chunk"
    assert role["model"] == NAME
    assert role["choices"] == [{"index": 3, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]
    assert {choice["index"] for piece in pieces for choice in piece["choices"]} == {3}
    assert "".join(piece["choices"][0]["delta"]["content"] for piece in [*pieces, last]) == "One. Two."
    assert last["choices"][0]["finish_reason"] == "stop"
    assert {piece["id"] for piece in [role, *pieces, last]} == {role["id"]}


def test_a_streamed_completion_is_stripped_and_ends_with_its_reason_and_usage_on_demand(server: RunningServer) -> None:
    answering(server, "  One. Two. \n")

    *pieces, usage = events(server, "completions", prompt="x", max_tokens=9, stream_options={"include_usage": True})

    assert "".join(piece["choices"][0]["text"] for piece in pieces) == "One. Tw"
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 9


def test_openais_client_reads_answers_and_streams(server: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    answering(server, "Yes.")

    chat = client.chat.completions.create(model="any", messages=[{"role": "user", "content": "Hi"}])
    stream = client.chat.completions.create(model="any", messages=[{"role": "user", "content": "Hi"}], stream=True)
    completion = client.completions.create(model="any", prompt="Hi")

    assert chat.choices[-1].message.content == "Yes."
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Yes."
    assert completion.choices[0].text == "Yes."


@pytest.mark.parametrize("fields", [{}, {"messages": [STORY]}])
def test_a_chats_prompt_is_refused_by_name(server: RunningServer, fields: dict[str, Any]) -> None:
    error = refused(server, "chat/completions", prompt="Hi", **fields)

    assert error["param"] == "prompt"
    assert error["code"] == "unsupported_parameter"


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("chat/completions", {}, "messages"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].message"),
        ("chat/completions", {"messages": [{"message": "Hi"}]}, "messages[0].role"),
        ("chat/completions", {"messages": [STORY, {"role": "user", "message": "a", "content": "b"}]}, "messages[1].message"),
        ("chat/completions", {"messages": [{"role": "user", "content": [PICTURE]}]}, "messages[0].content[0]"),
        ("chat/completions", {"messages": [{"role": "user", "message": [PICTURE]}]}, "messages[0].message[0]"),
        ("chat/completions", {"messages": [{**STORY, "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls"),
        ("chat/completions", {"messages": [STORY], "logprobs": True}, "logprobs"),
        ("chat/completions", {"messages": [STORY], "tools": [{"type": "function"}]}, "tools"),
        ("chat/completions", {"messages": [STORY], "temperature": 3}, "temperature"),
        ("chat/completions", {"messages": [STORY], "n": 2, "num_beams": 2}, "num_beams"),
        ("completions", {"prompt": ["a", "b"]}, "prompt"),
        ("completions", {"prompt": "x", "echo": True}, "echo"),
        ("completions", {"prompt": "x", "logprobs": 3}, "logprobs"),
        ("completions", {"prompt": "x" * 600}, "prompt"),
        ("chat/completions", {"messages": "x" * 600}, "messages"),
        ("embeddings", {}, "input"),
        ("embeddings", {"input": []}, "input"),
        ("embeddings", {"input": ["a", 3]}, "input[1]"),
        ("embeddings", {"input": ["a", "b" * 600]}, "input[1]"),
        ("embeddings", {"input": "a", "encoding_format": "base64"}, "encoding_format"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_path(server: RunningServer, path: str, fields: dict[str, Any], param: str) -> None:
    assert refused(server, path, **fields)["param"] == param


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("completions", {"prompt": "x", "echo": False, "logprobs": None, "user": "me", "stop": None, "n": 1, "stream": False}),
        ("chat/completions", {"messages": [{**STORY, "content": STORY["message"]}], "prompt": None, "user": "me", "logprobs": False}),
        ("embeddings", {"input": "x", "user": "me"}),
    ],
)
def test_what_the_reference_took_by_default_is_taken_without_a_warning(server: RunningServer, path: str, fields: dict[str, Any]) -> None:
    assert "warnings" not in post(server, path, **fields)


def test_a_field_that_no_api_documents_is_warned_about(server: RunningServer) -> None:
    warning = "mood: no API documents this field; it has no effect"

    for path, fields in (("chat/completions", {"messages": [STORY]}), ("completions", {"prompt": "x"}), ("embeddings", {"input": "x"})):
        assert post(server, path, mood="blue", **fields)["warnings"] == [warning]
    assert events(server, "completions", prompt="x", mood="blue")[-1]["warnings"] == [warning]


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_leaves_ends_its_answer(server: RunningServer, streams: bool) -> None:
    server.backend.engine.hangs_after = 1

    with pytest.raises(requests.RequestException):
        events(server, "chat/completions", messages="x", stream=streams, timeout_s=0.5)

    assert server.backend.activity.was_left_within(5)


def test_the_documents_show_these_requests_and_each_works(server: RunningServer) -> None:
    paths = requests.get(f"{server.url}/openapi.json", timeout=10).json()["paths"]

    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]
        assert "Alpaca" in body["schema"]["$ref"]
        for example in body["examples"].values():
            assert requests.post(f"{server.url}{path}", json=example["value"], timeout=10).status_code == 200


def test_the_operators_system_text_is_the_task_of_chats() -> None:
    with running_server(config(meta_instruction="Sing.")) as server:
        post(server, "chat/completions", messages="Hi")

        assert prompt_of(server) == "Sing.\n\n### Instruction:\nHi\n\n### Response: "
