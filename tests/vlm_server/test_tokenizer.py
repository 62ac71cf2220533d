import functools
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from tests.image_fixtures import tiny_folder
from tests.tiny_gguf import write_gguf
from vlm_server.tokenizer import TextTokenizer, load_tokenizer

TEXTS = [
    "Hello  world",
    " leading and trailing ",
    "你好！ émile naïve\n\n   x = 1  🎉",
    "The quick brown fox, 12345.67",
    "\ttabs\tand\r\nreturns",
    "",
    "   ",
    "▁",
]


@functools.cache
def internlm2() -> TextTokenizer:
    return TextTokenizer(load_tokenizer(tiny_folder("internlm2")))


@functools.cache
def internlm2s_pieces() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(tiny_folder("internlm2") / "tokenizer.model"))


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_internlm2s_tokens_are_its_sentencepieces(text: str) -> None:
    token_ids = internlm2().encode(text)

    assert token_ids == internlm2s_pieces().encode(text)
    assert internlm2().decode(token_ids) == internlm2s_pieces().decode(token_ids)


@given(st.text(st.sampled_from("the quick. brown\n fox 123 是好🎉é<>_|"), max_size=60))
def test_internlm2s_tokens_are_its_sentencepieces_for_any_text(text: str) -> None:
    assert internlm2().encode(text) == internlm2s_pieces().encode(text)


def test_internlm2_has_its_special_tokens_roles_and_template() -> None:
    tokenizer = internlm2()
    reference = tokenizer.reference
    begin, end = (tokenizer.token_id(token) for token in ("<|im_start|>", "<|im_end|>"))

    token_ids = reference.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=True)["input_ids"]

    assert (begin, end) == (len(reference) - 1, len(reference) - 2)
    assert token_ids[:2] == [1, begin]
    assert token_ids.count(begin) == 2
    assert token_ids.count(end) == 1
    assert (reference.bos_token_id, reference.eos_token_id, reference.pad_token_id, reference.unk_token_id) == (1, 2, 2, 0)
    assert tokenizer.encode("hi", add_special_tokens=True) == [1, *tokenizer.encode("hi")]
    assert tokenizer.decode([1, begin, *tokenizer.encode("hi"), end]) == "hi"


@pytest.mark.parametrize("name", ["llama", "internlm2"])
def test_the_bytes_of_tokens_join_to_the_text(name: str) -> None:
    tokenizer = TextTokenizer(load_tokenizer(tiny_folder(name)))
    for text in TEXTS[:-1]:
        token_ids = tokenizer.encode(text)

        assert b"".join(tokenizer.token_bytes(token_id) for token_id in token_ids).decode() == text


@pytest.mark.parametrize("name", ["llama", "internlm2"])
def test_special_and_unknown_ids_have_bytes_too(name: str) -> None:
    tokenizer = TextTokenizer(load_tokenizer(tiny_folder(name)))
    end = tokenizer.token_id("<|im_end|>")
    assert end is not None

    assert tokenizer.token_bytes(end) == b"<|im_end|>"
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.token_id("no such token") is None


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError), match=tmp_path.name):
        load_tokenizer(tmp_path)


def test_a_gguf_file_brings_its_own_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, TextTokenizer(load_tokenizer(tiny_folder("llama"))))

    tokenizer = TextTokenizer(load_tokenizer(file))

    for text in TEXTS:
        assert tokenizer.encode(text) == TextTokenizer(load_tokenizer(tiny_folder("llama"))).encode(text)
    assert tokenizer.token_id("<|im_end|>") == tokenizer.reference.eos_token_id


@pytest.mark.parametrize("name", ["llama", "internlm2"])
def test_chosen_special_tokens_are_shown_and_the_others_skipped(name: str) -> None:
    tokenizer = TextTokenizer(load_tokenizer(tiny_folder(name)))
    tokens = tokenizer.encode("The <|im_start|>quick brown<|im_end|> 你好")

    shown = tokenizer.showing({"<|im_start|>", "no token"}).decode(tokens)

    assert shown == tokenizer.decode(tokens, skip_special_tokens=False).replace("<|im_end|>", "")
    assert tokenizer.showing(()).decode(tokens) == tokenizer.decode(tokens)
    assert tokenizer.showing(()).decode(tokens, skip_special_tokens=False) == tokenizer.decode(tokens, skip_special_tokens=False)
