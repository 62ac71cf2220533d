"""Every call that the documents of LMDeploy's and OpenAI's users tell them to make over HTTP, as it is written there.

Nothing but host, import path, model name and the picture's URL is changed. What those documents type into a shell stands in
tests/external/test_documented_commands.py, what they type to start a server in tests/vlm_server/test_cli.py, and the demo server of
Chinese-LLaMA-Alpaca has tests of its own.
"""

import codecs
import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from openai import AsyncOpenAI, OpenAI

from engine.request import Prompt, SamplingParams
from tests.contract.fake_engine import SESSION_LEN
from tests.contract.running import RunningServer
from tests.vlm_server.byte_tokenizer import EOS
from vlm_server.client import APIClient
from vlm_server.examples import RED_CIRCLE

SYSTEM_AND_USER: Any = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": " provide three suggestions about time management"},
]
PICTURE: Any = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Describe the image please"},
            {"type": "image_url", "image_url": {"url": RED_CIRCLE}},
        ],
    }
]
SEVERAL_TURNS = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！有什么我可以帮你的吗？"},
    {"role": "user", "content": "请介绍一下你自己"},
]
POEM = "春风又绿江南岸，明月何时照我还？🌕"


@pytest.fixture
def openai_client(server: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(api_key="YOUR_API_KEY", base_url=f"{server.url}/v1", max_retries=0) as client:
        yield client


@pytest.fixture
def api_client(server: RunningServer) -> Iterator[APIClient]:
    client = APIClient(server.url)
    yield client
    client.end_session(1)


def post(server: RunningServer, path: str, body: dict[str, Any], **options: Any) -> requests.Response:
    return requests.post(f"{server.url}{path}", json=body, timeout=30, **options)


def writes(text: str) -> Any:
    """A script for the engine: this text, a byte at a time."""

    def script(prompt: Prompt, params: SamplingParams) -> list[int]:
        return [*text.encode(), EOS]

    return script


# OpenAI's SDK


def test_openai_sdk_takes_any_key_and_names_the_model(openai_client: OpenAI, server: RunningServer) -> None:
    assert openai_client.models.list().data[0].id == server.model


def test_openai_sdk_chat_with_system_text_temperature_and_top_p(openai_client: OpenAI) -> None:
    model_name = openai_client.models.list().data[0].id

    response = openai_client.chat.completions.create(model=model_name, messages=SYSTEM_AND_USER, temperature=0.8, top_p=0.8)

    assert response.choices[0].message.content


async def test_async_openai_sdk_reads_the_models_page_and_chats(server: RunningServer) -> None:
    async with AsyncOpenAI(api_key="YOUR_API_KEY", base_url=f"{server.url}/v1") as client:
        model_cards = await client.models.list()._get_page()
        response = await client.chat.completions.create(model=model_cards.data[0].id, messages=SYSTEM_AND_USER, temperature=0.8, top_p=0.8)

    assert response.choices[0].message.content


def test_openai_sdk_describes_a_picture(openai_client: OpenAI) -> None:
    model_name = openai_client.models.list().data[0].id

    response = openai_client.chat.completions.create(model=model_name, messages=PICTURE, temperature=0.8, top_p=0.8)

    assert response.choices[0].message.content
    assert response.usage is not None
    assert response.usage.to_dict()["prompt_tokens_details"]["image_tokens"] > 0  # type: ignore[index]


# APIClient


def test_api_client_says_this_is_a_test(api_client: APIClient) -> None:
    model_name = api_client.available_models[0]  # type: ignore[index]
    messages = [{"role": "user", "content": "Say this is a test!"}]

    items = list(api_client.chat_completions_v1(model=model_name, messages=messages))

    assert items[0]["choices"][0]["message"]["content"]


def test_api_client_completes_hi(api_client: APIClient) -> None:
    model_name = api_client.available_models[0]  # type: ignore[index]

    items = list(api_client.completions_v1(model=model_name, prompt="hi"))

    assert items[0]["choices"][0]["text"]


def test_api_client_says_hi_without_a_session(api_client: APIClient) -> None:
    items = list(api_client.chat_interactive_v1(prompt="hi"))

    assert items[0]["text"]


def test_api_client_describes_a_picture(api_client: APIClient) -> None:
    model_name = api_client.available_models[0]  # type: ignore[index]

    items = list(api_client.chat_completions_v1(model=model_name, messages=PICTURE))

    assert items[0]["usage"]["prompt_tokens_details"]["image_tokens"] > 0


def test_api_client_takes_four_turns_and_later_ones_know_the_earlier(api_client: APIClient, server: RunningServer) -> None:
    prompts = [
        "hi, what's your name?",
        "who developed you?",
        "Tell me more about your developers",
        "Summarize the information we've talked so far",
    ]

    for prompt in prompts:
        for item in api_client.chat_interactive_v1(prompt=prompt, session_id=1, interactive_mode=True, stream=False):
            assert item["text"]

    last = server.backend.pipeline.tokenizer.decode(server.backend.engine.requests[-1][0].token_ids)
    assert [last.find(prompt) for prompt in prompts] == sorted(last.find(prompt) for prompt in prompts)
    assert last.find(prompts[0]) >= 0


# Bodies that the documents send with curl


def test_get_models(server: RunningServer) -> None:
    models = requests.get(f"{server.url}/v1/models", timeout=30).json()

    assert (models["object"], models["data"][0]["object"]) == ("list", "model")


def test_post_an_interactive_turn(server: RunningServer) -> None:
    answer = post(server, "/v1/chat/interactive", {"prompt": "Hello! How are you?", "session_id": 1, "interactive_mode": True}).json()

    assert answer["text"]
    assert set(answer) >= {"text", "tokens", "input_tokens", "history_tokens", "finish_reason"}
    APIClient(server.url).end_session(1)


def test_post_a_chat(server: RunningServer) -> None:
    body = {"model": server.model, "messages": [{"role": "user", "content": "Hello! How are you?"}]}

    assert post(server, "/v1/chat/completions", body).json()["choices"][0]["message"]["content"]


def test_post_a_completion(server: RunningServer) -> None:
    answer = post(server, "/v1/completions", {"model": server.model, "prompt": "two steps to build a house:"}).json()

    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"]


def test_post_a_chinese_chat_in_utf_8_and_read_it_so(server: RunningServer) -> None:
    server.backend.engine.script = writes(POEM)
    body = {"model": server.model, "messages": [{"role": "user", "content": "你好"}]}

    response = post(server, "/v1/chat/completions", body)

    assert response.content.decode("utf-8").count(POEM) == 1
    prompt = server.backend.pipeline.tokenizer.decode(server.backend.engine.requests[-1][0].token_ids)
    assert "user: 你好" in prompt


def test_post_several_chinese_turns(server: RunningServer) -> None:
    body = {"model": server.model, "messages": SEVERAL_TURNS, "temperature": 0.7, "max_tokens": 1024, "stream": False}

    response = post(server, "/v1/chat/completions", body)

    assert response.json()["choices"][0]["message"]["content"]
    prompt, params = server.backend.engine.requests[-1]
    text = server.backend.pipeline.tokenizer.decode(prompt.token_ids)
    assert [message["content"] in text for message in SEVERAL_TURNS] == [True] * 3
    assert (params.temperature, params.max_tokens) == (0.7, 1024)


def test_stream_a_chinese_poem_without_a_broken_character(server: RunningServer) -> None:
    server.backend.engine.script = writes(POEM)
    body = {"model": server.model, "messages": [{"role": "user", "content": "写一首诗歌"}], "stream": True}

    with post(server, "/v1/chat/completions", body, stream=True) as response:
        lines = [line for line in response.iter_lines(delimiter=b"\n") if line]

    chunks = [codecs.decode(line.removeprefix(b"data: "), "utf-8") for line in lines]
    assert chunks[-1] == "[DONE]"
    pieces = [json.loads(chunk)["choices"][0]["delta"].get("content") or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == POEM
    assert not any("�" in piece for piece in pieces)


SAMPLING = {"temperature": 0.25, "max_tokens": 7, "top_p": 0.5, "frequency_penalty": 0.75, "presence_penalty": -0.5}


@pytest.mark.parametrize("name", SAMPLING)
def test_the_fields_of_the_documents_page_reach_the_sampler(server: RunningServer, name: str) -> None:
    body = {"model": server.model, "messages": [{"role": "user", "content": "Hello!"}], name: SAMPLING[name]}

    assert post(server, "/v1/chat/completions", body).ok

    assert getattr(server.backend.engine.requests[-1][1], name) == SAMPLING[name]


# What the FAQ promises


def test_an_answer_that_fills_the_window_ends_with_length(server: RunningServer) -> None:
    server.backend.engine.script = writes("long " * SESSION_LEN)
    body = {"model": server.model, "messages": [{"role": "user", "content": "Hello!"}]}

    assert post(server, "/v1/chat/completions", body).json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_prompt_over_the_window_is_refused_with_both_numbers_and_the_flag(server: RunningServer, path: str) -> None:
    text = "x" * 2 * SESSION_LEN
    prompt = {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}

    response = post(server, path, {"model": server.model, **prompt})

    num_tokens = len(server.backend.pipeline.tokenizer.encode(text))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert f"{SESSION_LEN}" in error["message"]
    assert "--session-len" in error["message"]
    assert any(int(word) >= num_tokens for word in error["message"].replace(",", " ").split() if word.isdigit())


def test_an_interactive_prompt_over_the_window_is_an_empty_answer_with_length(server: RunningServer) -> None:
    response = post(server, "/v1/chat/interactive", {"prompt": "x" * 2 * SESSION_LEN})

    assert response.status_code == 200
    assert (response.json()["text"], response.json()["tokens"], response.json()["finish_reason"]) == ("", 0, "length")


def test_a_mixed_up_session_is_reset_by_one_request_without_interactive_mode(api_client: APIClient) -> None:
    for prompt in ("one", "two"):
        list(api_client.chat_interactive_v1(prompt, session_id=1, interactive_mode=True))

    [reset] = api_client.chat_interactive_v1("three", session_id=1, interactive_mode=False)
    [anew] = api_client.chat_interactive_v1("four", session_id=1, interactive_mode=True)

    assert reset["history_tokens"] > 0
    assert (anew["history_tokens"], anew["tokens"] > 0) == (0, True)


def test_sessions_are_off_unless_they_are_asked_for(api_client: APIClient) -> None:
    list(api_client.chat_interactive_v1("one", session_id=1))
    [second] = api_client.chat_interactive_v1("two", session_id=1)

    assert second["history_tokens"] == 0


@pytest.mark.parametrize("name", ["prompt", "messages"])
@pytest.mark.parametrize("value", ["hi", SEVERAL_TURNS], ids=["string", "history"])
def test_an_interactive_prompt_is_a_string_or_a_history_under_either_name(server: RunningServer, name: str, value: object) -> None:
    assert post(server, "/v1/chat/interactive", {name: value}).json()["text"]


def test_a_stop_word_may_be_any_string(server: RunningServer) -> None:
    server.backend.engine.script = writes("one two three")
    body = {"model": server.model, "messages": [{"role": "user", "content": "count"}], "stop": ["o thr"]}

    choice = post(server, "/v1/chat/completions", body).json()["choices"][0]

    assert (choice["message"]["content"], choice["finish_reason"]) == ("one tw", "stop")


# Other clients that are known to be used


def test_a_client_that_sends_stop_false_and_splits_on_blank_lines_reads_the_stream(server: RunningServer) -> None:
    body = {"model": server.model, "messages": [{"role": "user", "content": "hi"}], "stream": True, "stop": False}

    events = post(server, "/v1/chat/completions", body).content.decode().split("\n\n")

    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("finish_reason" in chunk["choices"][0] for chunk in chunks)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"
    assert {chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]} == {None}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_load_generator_reads_as_many_tokens_as_it_asked_for(server: RunningServer, path: str) -> None:
    """LMDeploy's `profile_restful_api.py` reads lines, cuts `data:` off, stops at `[DONE]`, and wants `ignore_eos` to hold."""
    prompt = {"prompt": "hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    body = {"model": server.model, **prompt, "max_tokens": 40, "ignore_eos": True, "stream": True, "temperature": 0.0, "n": 1}
    body |= {"best_of": 1} if path == "/v1/completions" else {}
    texts = []

    with post(server, path, {**body, "stream_options": {"include_usage": True}}, stream=True) as response:
        for line in response.iter_lines():
            data = line.decode().removeprefix("data:").strip()
            if not data or data == "[DONE]":
                continue
            chunk = json.loads(data)
            texts += [choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in chunk["choices"]]
            usage = chunk.get("usage")

    assert usage["completion_tokens"] == 40
    assert len("".join(texts).encode()) >= 37  # a last character may lack bytes
