"""`APIClient`'s methods for sessions, as LMDeploy's users call theirs. Nothing here knows which engine answers."""

import inspect
from collections.abc import Iterator

import pytest
import requests

from tests.contract.running import RunningServer
from vlm_server.client import APIClient
from vlm_server.examples import RED_CIRCLE


@pytest.fixture
def client(server: RunningServer) -> Iterator[APIClient]:
    client = APIClient(server.url)
    yield client
    client.end_session(1)


def test_curl_of_an_interactive_turn(server: RunningServer) -> None:
    body = {"prompt": "Hello! How are you?", "session_id": 1, "interactive_mode": True}

    answer = requests.post(f"{server.url}/v1/chat/interactive", json=body, timeout=10).json()

    assert answer["text"]
    assert answer["finish_reason"] in ("stop", "length")
    APIClient(server.url).end_session(1)


def test_chat_interactive_v1_without_a_session(client: APIClient) -> None:
    items = client.chat_interactive_v1(prompt="hi")

    assert isinstance(items, Iterator)
    [item] = items
    assert item["text"]
    assert item["history_tokens"] == 0


def test_four_turns_on_one_session(client: APIClient) -> None:
    prompts = (
        "hi, what's your name?",
        "who developed you?",
        "Tell me more about your developers",
        "Summarize the information we've talked so far",
    )
    history_tokens = 0
    for prompt in prompts:
        for item in client.chat_interactive_v1(prompt=prompt, session_id=1, interactive_mode=True, stream=False):
            assert item["text"]
            assert item["history_tokens"] == history_tokens
            history_tokens += item["input_tokens"] + item["tokens"]


def test_a_stream_of_pieces_is_the_whole_answer(client: APIClient) -> None:
    [whole] = client.chat_interactive_v1(prompt="hi", temperature=0.0)

    pieces = list(client.chat_interactive_v1(prompt="hi", temperature=0.0, stream=True))

    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert pieces[-1]["finish_reason"] == whole["finish_reason"]
    assert pieces[-1]["tokens"] == whole["tokens"]


def test_a_turn_with_a_picture(client: APIClient) -> None:
    [without] = client.chat_interactive_v1(prompt="Describe the image please")

    for image_url in (RED_CIRCLE, [RED_CIRCLE]):
        [item] = client.chat_interactive_v1(prompt="Describe the image please", image_url=image_url)
        assert item["input_tokens"] > without["input_tokens"]


def test_a_whole_history_is_accepted_as_prompt(client: APIClient) -> None:
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "again"}]

    [item] = client.chat_interactive_v1(prompt=history)

    assert item["text"]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_yields_text_tokens_and_finish_reason(client: APIClient, stream: bool) -> None:
    pieces = list(client.chat("hi", session_id=1, stream=stream))

    assert "".join(text for text, _, _ in pieces)
    assert [reason for _, _, reason in pieces[:-1]] == [None] * (len(pieces) - 1)
    text, tokens, reason = pieces[-1]
    assert isinstance(text, str)
    assert 0 < tokens <= 512
    assert reason in ("stop", "length")


def test_a_session_is_kept_by_chat_until_it_is_ended(client: APIClient) -> None:
    for _ in client.chat("hi", session_id=1):
        pass
    [kept] = client.chat_interactive_v1(prompt="and?", session_id=1, interactive_mode=True)

    assert client.end_session(1) is None
    [anew] = client.chat_interactive_v1(prompt="and?", session_id=1, interactive_mode=True)

    assert kept["history_tokens"] > 0
    assert anew["history_tokens"] == 0


def test_a_session_for_chat_needs_a_number(client: APIClient) -> None:
    with pytest.raises(AssertionError):
        next(client.chat("hi", session_id=-1))


def test_an_error_is_yielded_and_not_raised(client: APIClient) -> None:
    [item] = client.chat_interactive_v1(prompt="hi", temperature=3.0)

    assert (item["code"], item["param"]) == (400, "temperature")
    assert list(client.chat("hi", session_id=1, temperature=3.0)) == [(item["message"], 0, "error")]


def test_the_defaults_are_lmdeploys() -> None:
    def defaults(method: object) -> dict[str, object]:
        parameters = inspect.signature(method).parameters.values()  # type: ignore[arg-type]
        return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}

    sampling = {"top_p": 0.8, "top_k": 40, "temperature": 0.8, "repetition_penalty": 1.0, "ignore_eos": False, "stream": False}
    assert defaults(APIClient.chat) == {**sampling, "image_url": None, "request_output_len": 512}
    assert defaults(APIClient.chat_interactive_v1) == {
        **sampling,
        **{"image_url": None, "session_id": -1, "interactive_mode": False, "stop": None, "request_output_len": None},
        **{"skip_special_tokens": True, "adapter_name": None},
    }
