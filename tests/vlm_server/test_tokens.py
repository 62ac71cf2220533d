"""Text and chats to token ids and back, without generating."""

from typing import Any

import pytest
import requests

from tests.contract.fake_engine import TOKENS_PER_IMAGE
from tests.contract.running import RunningServer
from tests.vlm_server.byte_tokenizer import BOS, EOS, IMAGE, VOCAB_SIZE
from vlm_server.examples import RED_CIRCLE

CHAT = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
BAD_PICTURE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "bad"}}]}]


def post(server: RunningServer, path: str, **body: Any) -> requests.Response:
    return requests.post(f"{server.url}{path}", json=body, timeout=10)


def test_a_prompt_is_tokenized_as_a_completion_takes_it(server: RunningServer) -> None:
    answer = post(server, "/tokenize", prompt="hé", model=server.model).json()

    assert answer == {"count": 4, "max_model_len": 512, "tokens": [BOS, *"hé".encode()]}
    assert post(server, "/tokenize", prompt="hé", add_special_tokens=False).json()["tokens"] == list("hé".encode())
    usage = post(server, "/v1/completions", model=server.model, prompt="hé").json()["usage"]
    assert usage["prompt_tokens"] == 3, "the scripted pipeline adds no first token to a completion"


def test_a_chat_is_counted_with_its_pictures_and_nothing_is_generated(server: RunningServer) -> None:
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": RED_CIRCLE}}]}]

    answer = post(server, "/tokenize", messages=picture).json()

    assert answer["tokens"].count(IMAGE) == TOKENS_PER_IMAGE
    assert answer["count"] == len(answer["tokens"])
    assert bytes(answer["tokens"][-11:]) == b"assistant: "
    without = post(server, "/tokenize", messages=picture, add_generation_prompt=False).json()["tokens"]
    assert without == answer["tokens"][:-11]
    assert not server.backend.engine.requests


def test_a_chat_with_tools_is_counted_as_it_is_charged(server: RunningServer) -> None:
    called = [{"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Hangzhou"}'}}]
    turns = [*CHAT, {"role": "assistant", "tool_calls": called}, {"role": "tool", "tool_call_id": "1", "content": "Sunny"}]

    counted = post(server, "/tokenize", messages=turns, tools=[TOOL]).json()

    charged = post(server, "/v1/chat/completions", model=server.model, messages=turns, tools=[TOOL]).json()["usage"]["prompt_tokens"]
    assert counted["count"] == charged
    assert b"get_weather" in bytes(counted["tokens"][1:])
    assert counted["count"] > post(server, "/tokenize", messages=turns).json()["count"]


def test_settings_for_pictures_are_those_that_the_chat_would_have(server: RunningServer) -> None:
    settings = {"max_pixels": 9, "image": {"do_image_splitting": False}, "size": None}

    assert post(server, "/tokenize", messages=CHAT, mm_processor_kwargs=settings).status_code == 200
    counted_with = server.backend.pipeline.image_settings
    post(server, "/v1/chat/completions", model=server.model, messages=CHAT, mm_processor_kwargs=settings)

    assert counted_with == server.backend.pipeline.image_settings == {"max_pixels": 9, "image": {"do_image_splitting": False}}
    refused = post(server, "/tokenize", messages=CHAT, mm_processor_kwargs={"max_pixels": 0})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "mm_processor_kwargs.max_pixels")


def test_a_chat_that_is_continued_is_counted_without_its_end(server: RunningServer) -> None:
    begun = [*CHAT, {"role": "assistant", "content": "Once"}]

    tokens = post(server, "/tokenize", messages=begun, continue_final_message=True).json()["tokens"]

    assert bytes(tokens[1:]).endswith(b"assistant: Once")


def test_the_texts_of_tokens_come_on_demand(server: RunningServer) -> None:
    assert post(server, "/tokenize", prompt="né", return_token_strs=True).json()["token_strs"] == ["<s>", "n", "\ufffd", "\ufffd"]


@pytest.mark.parametrize("body", [{}, {"prompt": "x", "messages": CHAT}])
def test_one_of_prompt_and_messages_is_needed(server: RunningServer, body: dict[str, Any]) -> None:
    answer = post(server, "/tokenize", **body)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"
    assert "either prompt or messages" in answer.json()["error"]["message"]


def test_token_ids_become_text(server: RunningServer) -> None:
    tokens = [BOS, *"你好".encode(), EOS]

    assert post(server, "/detokenize", tokens=tokens).json() == {"prompt": "<s>你好</s>"}
    assert post(server, "/detokenize", tokens=tokens, skip_special_tokens=True).json() == {"prompt": "你好"}


def test_lmdeploys_encode_takes_one_text_or_several(server: RunningServer) -> None:
    assert post(server, "/v1/encode", input="ab").json() == {"input_ids": [BOS, 97, 98], "length": 3}
    assert post(server, "/v1/encode", input=["ab", ""], add_bos=False).json() == {"input_ids": [[97, 98], []], "length": [2, 0]}
    as_chat = post(server, "/v1/encode", input="hi", do_preprocess=True).json()
    assert as_chat["input_ids"] == post(server, "/tokenize", messages=CHAT).json()["tokens"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"messages": BAD_PICTURE}, "messages[0].content[0].image_url"),
        ("/tokenize", {"messages": CHAT, "tools": [{}]}, "tools[0].type"),
        ("/tokenize", {"messages": CHAT, "continue_final_message": True}, "continue_final_message"),
        ("/tokenize", {"messages": CHAT, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [97, VOCAB_SIZE]}, "tokens[1]"),
        ("/v1/encode", {}, "input"),
        ("/v1/encode", {"input": "\ud800"}, "input"),
    ],
)  # fmt: skip
def test_bad_requests_are_named(server: RunningServer, path: str, body: dict[str, Any], param: str) -> None:
    answer = post(server, path, **body)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(("path", "field"), [("/tokenize", "prompt"), ("/v1/encode", "input")])
def test_models_are_checked_and_unknown_fields_warned_about(server: RunningServer, path: str, field: str) -> None:
    unknown = post(server, path, model="other", **{field: "x"})
    warned = post(server, path, odd=1, **{field: "x"})

    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert warned.json()["warnings"] == ["odd: no API documents this field; it has no effect"]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/tokenize", {"messages": CHAT, "add_special_tokens": False}, "add_special_tokens"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": False}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "x", "tools": [TOOL]}, "tools"),
        ("/tokenize", {"prompt": "x", "mm_processor_kwargs": {"max_pixels": 9}}, "mm_processor_kwargs"),
        ("/v1/encode", {"input": "x", "do_preprocess": True, "add_bos": False}, "add_bos"),
    ],
)
def test_a_field_of_the_other_kind_of_request_is_warned_about(server: RunningServer, path: str, body: dict[str, Any], field: str) -> None:
    assert post(server, path, **body).json()["warnings"] == [f"{field}: it has no effect here"]
    without = {name: value for name, value in body.items() if name != field}
    assert "warnings" not in post(server, path, **without).json()


@pytest.mark.parametrize(
    ("path", "body", "num_pieces"),
    [
        ("/tokenize", {"prompt": "hi", "return_token_strs": True}, 2),
        ("/detokenize", {"tokens": [104]}, 1),
        ("/v1/encode", {"input": ["a", "b"]}, 2),
        ("/v1/completions", {"model": "fake", "prompt": ["a", "b"], "echo": True}, 3),
        ("/get_ppl", {"input": "hi"}, 1),
    ],
)
def test_texts_are_tokenized_in_the_threads_of_the_pipeline(
    server: RunningServer, path: str, body: dict[str, Any], num_pieces: int
) -> None:
    """Regression: they took the threads of all other work, and the texts of tokens were written on the event loop."""
    if "model" in body:
        body = {**body, "model": server.model}

    assert post(server, path, **body).status_code == 200
    assert server.backend.pipeline.num_in_thread == num_pieces
