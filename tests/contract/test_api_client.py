"""`APIClient` as LMDeploy's users call theirs."""

import inspect
from collections.abc import Iterator

import pytest

from tests.contract.running import RunningServer, fake_config, running_server
from vlm_server.client import APIClient, get_model_list
from vlm_server.examples import RED_CIRCLE

TEST = [{"role": "user", "content": "Say this is a test!"}]


@pytest.fixture
def client(server: RunningServer) -> APIClient:
    return APIClient(server.url)


@pytest.fixture
def model(client: APIClient) -> str:
    models = client.available_models
    assert models
    return models[0]


def test_every_method_is_a_generator_that_yields_dicts(client: APIClient, model: str) -> None:
    items = client.chat_completions_v1(model=model, messages=TEST)

    assert isinstance(items, Iterator)
    [item] = items
    assert item["choices"][0]["message"]["content"]
    assert item["choices"][0]["finish_reason"] in ("stop", "length")


def test_a_completion_answers(client: APIClient, model: str) -> None:
    [item] = client.completions_v1(model=model, prompt="hi")

    assert item["choices"][0]["text"]
    assert item["usage"]["completion_tokens"] <= 16


def test_encode_gives_token_ids_and_their_number(client: APIClient) -> None:
    input_ids, length = client.encode("hi there")
    several, lengths = client.encode(["hi", "there"], add_bos=False)

    assert len(input_ids) == length > 0
    assert [len(ids) for ids in several] == lengths
    assert client.encode("hi", do_preprocess=True)[1] > lengths[0]


def test_streams_are_dicts_without_the_end_mark(client: APIClient, model: str) -> None:
    for items in (
        client.chat_completions_v1(model=model, messages=TEST, stream=True, max_tokens=8),
        client.completions_v1(model=model, prompt="hi", stream=True),
    ):
        chunks = list(items)
        assert all(isinstance(chunk, dict) for chunk in chunks)
        assert all("finish_reason" in chunk["choices"][0] for chunk in chunks)
        assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")


def test_a_picture_message_answers(client: APIClient, model: str) -> None:
    parts = [{"type": "text", "text": "Describe the image please"}, {"type": "image_url", "image_url": {"url": RED_CIRCLE}}]

    [item] = client.chat_completions_v1(model=model, messages=[{"role": "user", "content": parts}], max_tokens=16)

    assert item["usage"]["prompt_tokens_details"]["image_tokens"] > 0


def test_a_plain_string_is_accepted_as_messages(client: APIClient, model: str) -> None:
    [item] = client.chat_completions_v1(model=model, messages="two steps to build a house:", max_tokens=8)

    assert item["choices"][0]["message"]["role"] == "assistant"


def test_extra_arguments_travel_in_one_field_without_effect(client: APIClient, model: str) -> None:
    [item] = client.chat_completions_v1(model=model, messages=TEST, session_id=3)

    assert "warnings" not in item


def test_an_error_is_yielded_and_not_raised(client: APIClient, model: str) -> None:
    for stream in (False, True):
        [item] = client.chat_completions_v1(model="no-such-model", messages=TEST, stream=stream)
        assert item["code"] == 404
        assert item["object"] == "error"
        assert item["error"]["code"] == "model_not_found"


def test_the_defaults_are_lmdeploys() -> None:
    chat = {name: parameter.default for name, parameter in inspect.signature(APIClient.chat_completions_v1).parameters.items()}
    completion = {name: parameter.default for name, parameter in inspect.signature(APIClient.completions_v1).parameters.items()}

    assert (chat["temperature"], chat["top_p"], chat["top_k"], chat["repetition_penalty"], chat["min_p"]) == (0.7, 1.0, 40, 1.0, 0.0)
    assert (chat["max_tokens"], chat["n"], chat["top_logprobs"], chat["logprobs"], chat["stream"]) == (None, 1, 0, False, False)
    assert (completion["max_tokens"], completion["max_completion_tokens"], completion["temperature"]) == (16, 16, 0.7)


def test_the_key_is_sent() -> None:
    with running_server(fake_config(api_keys=("secret",))) as server:
        assert APIClient(server.url).available_models is None
        assert APIClient(server.url, api_key="secret").available_models == [server.model]
        assert get_model_list(f"{server.url}/v1/models", {"Authorization": "Bearer secret"}) == [server.model]
