"""Text between a prompt and a suffix: the models' formats, and what a request may ask for."""

from typing import Any

import pytest
import requests

from tests.contract.running import RunningServer
from tests.tiny_models import make_tokenizer
from tests.vlm_server.byte_tokenizer import BOS, EOS, ByteTokenizer
from vlm_server.infill import INFILL_FORMATS, infill_end_ids, infill_format, infill_tokens
from vlm_server.tokenizer import TextTokenizer

FORMAT = INFILL_FORMATS["qwen"]
PREFIX, SUFFIX, MIDDLE, END = 1, 2, 3, 4  # bytes that no text here has
INFILL_IDS = dict(zip((*FORMAT.markers, "<|file_sep|>"), (PREFIX, SUFFIX, MIDDLE, END), strict=True))


class InfillTokenizer(ByteTokenizer):
    """Bytes, and Qwen's tokens for filling in."""

    def added_token_id(self, token: str) -> int | None:
        return INFILL_IDS.get(token)


def post(server: RunningServer, **fields: Any) -> requests.Response:
    return requests.post(f"{server.url}/v1/completions", json={"model": server.model, "prompt": "a", "suffix": "b", **fields}, timeout=10)


def test_the_model_is_asked_for_what_is_between_prompt_and_suffix(server: RunningServer) -> None:
    server.backend.pipeline.tokenizer = InfillTokenizer()
    server.backend.engine.script = lambda prompt, params: [*b"mid", END, *b"next file", EOS]

    choices = post(server, prompt=["a", "c"]).json()["choices"]

    assert [(choice["text"], choice["finish_reason"]) for choice in choices] == [("mid", "stop")] * 2
    prompts = [list(prompt.token_ids) for prompt, _ in server.backend.engine.requests]
    assert prompts == [[BOS, PREFIX, ord(letter), SUFFIX, ord("b"), MIDDLE] for letter in "ac"]


def test_ends_of_the_middle_do_not_end_it_where_ends_are_ignored(server: RunningServer) -> None:
    server.backend.pipeline.tokenizer = InfillTokenizer()

    post(server, ignore_eos=True, max_tokens=3)

    assert server.backend.engine.requests[-1][1].stop_token_ids == ()


@pytest.mark.parametrize("fields", [{"echo": True}, {"prompt": [97]}, {"prompt": [[97], [98]]}, {"suffix": 5}], ids=str)
def test_what_does_not_go_with_a_suffix_is_refused(server: RunningServer, fields: dict[str, Any]) -> None:
    server.backend.pipeline.tokenizer = InfillTokenizer()

    error = post(server, **fields).json()["error"]

    assert (error["param"], error["code"]) == ("suffix", "invalid_value")


def test_a_model_without_tokens_for_it_refuses_a_suffix_by_name(server: RunningServer) -> None:
    response = post(server)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "suffix"
    assert response.json()["error"]["code"] == "unsupported_parameter"
    assert post(server, suffix="").status_code == post(server, suffix=None).status_code == 200


@pytest.mark.parametrize("name", INFILL_FORMATS)
def test_a_formats_prompt_is_its_text_as_the_tokenizer_reads_it(name: str) -> None:
    form = INFILL_FORMATS[name]
    tokenizer = TextTokenizer(make_tokenizer(("<s>", "</s>", *form.markers, *form.ends), bos_token="<s>", eos_token="</s>"))
    before, between, after = form.markers

    token_ids = infill_tokens(form, "def f(x):", "    return y", tokenizer)

    assert infill_format(tokenizer) == form
    assert token_ids == tokenizer.encode(f"{before}def f(x):{between}    return y{after}", add_special_tokens=True)
    assert set(infill_end_ids(form, tokenizer)) == {tokenizer.token_id(word) for word in (*form.markers, *form.ends)}


def test_words_that_are_no_whole_tokens_make_no_format() -> None:
    assert infill_format(TextTokenizer(make_tokenizer(("<s>", "</s>"), bos_token="<s>", eos_token="</s>"))) is None
