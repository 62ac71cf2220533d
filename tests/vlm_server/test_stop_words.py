"""The chat template's stop words end every answer, streamed or whole, unless end tokens are to be ignored."""

from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests.contract.fake_engine import FakeBackend
from tests.contract.running import MODEL, RunningServer, fake_config, serving
from tests.vlm_server.byte_tokenizer import EOS, IMAGE, VOCAB_SIZE
from vlm_server.app import create_app
from vlm_server.detokenizer import StopWords


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    backend = FakeBackend()
    backend.stop_words = StopWords(strings=("\nHuman:",), token_ids=(IMAGE, VOCAB_SIZE))
    with serving(create_app(fake_config(), open_backend=backend.open)) as url:
        yield RunningServer(url, MODEL, backend)


def answer(server: RunningServer, token_ids: list[int], **fields: Any) -> tuple[str, str]:
    """The chat's text and finish reason, which are also the completion's, for an engine that writes these tokens."""
    server.backend.engine.script = lambda prompt, params: token_ids
    chat = requests.post(
        f"{server.url}/v1/chat/completions",
        json={"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields},
        timeout=10,
    ).json()["choices"][0]
    text = requests.post(f"{server.url}/v1/completions", json={"model": MODEL, "prompt": "hi", "max_tokens": 50, **fields}, timeout=10)
    assert text.json()["choices"][0]["text"] == chat["message"]["content"]
    return chat["message"]["content"], chat["finish_reason"]


def test_a_stop_word_of_several_tokens_ends_an_answer(server: RunningServer) -> None:
    assert answer(server, [*b"Fine.\nHuman: and you?", EOS]) == ("Fine.", "stop")


def test_a_stop_word_that_is_a_token_ends_an_answer(server: RunningServer) -> None:
    assert answer(server, [*b"Fine.", IMAGE, *b" no", EOS]) == ("Fine.", "stop")


def test_the_requests_own_stop_strings_end_an_answer_too(server: RunningServer) -> None:
    assert answer(server, [*b"One. Two.\nHuman:", EOS], stop=" Two") == ("One.", "stop")
    assert answer(server, [*b"One.\nHuman: Two.", EOS], stop=" Two", stop_token_ids=[5]) == ("One.", "stop")
    assert server.backend.engine.requests[-1][1].stop_token_ids == (5, IMAGE)


def test_an_id_that_the_model_does_not_have_is_left_out(server: RunningServer) -> None:
    answer(server, [*b"Fine.", EOS])

    assert server.backend.engine.requests[-1][1].stop_token_ids == (IMAGE,)


def test_stop_words_are_ignored_with_the_end_tokens(server: RunningServer) -> None:
    text, reason = answer(server, [*b"Go\nHuman:"], ignore_eos=True, max_tokens=9)

    assert (text, reason) == ("Go\nHuman:", "length")
    assert server.backend.engine.requests[-1][1].stop_token_ids == ()
