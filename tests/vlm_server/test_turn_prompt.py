"""Prompts of further turns: the tokens of earlier ones stay, and the whole reads as the template writes the whole conversation."""

import asyncio
import functools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.image_fixtures import EMBEDDED, SIZES, FakeImages, picture, tiny_folder
from vision.image import ImageRef
from vlm_server.picture_loading import ImagesNotSupportedError
from vlm_server.pipeline import Pipeline
from vlm_server.transcript import Transcript, TurnPrompt

NOTHING = Transcript()
TEXT_MODELS = ["llama", "internlm2"]
IMAGE_MODELS = ["llava", "qwen2_5_vl", "idefics3", EMBEDDED]
PICTURES = {name: picture(size, seed) for seed, (name, size) in enumerate(SIZES.items())}

WORDS = st.sampled_from(["", " ", "hi", "你好", "\n", "<image>", "<|im_end|>", "</s>", "<ima", "ge>", "🌍", "  two ", "<|image_pad|>", "▁"])
TEXTS = st.lists(WORDS, max_size=4).map("".join)
ASKED = st.tuples(TEXTS, st.lists(st.sampled_from(["wide", "dot"]), max_size=1))
ANSWERED = st.tuples(st.lists(st.integers(0, 10**6), max_size=6), st.booleans(), st.sampled_from(["", " ", " ok", "Well\n"]))


@functools.cache
def pipeline_of(name: str) -> Pipeline:
    return Pipeline.load(tiny_folder(name), images=FakeImages(name, PICTURES))


def user(text: str, pictures: list[str]) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": f"picture:{name}"}} for name in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def turn(pipeline: Pipeline, messages: list[dict[str, Any]], known: Transcript = NOTHING) -> TurnPrompt:
    found = asyncio.run(pipeline.turn_prompt(messages, known=known))
    for array in (array for image in found.prompt.images for array in image.arrays.values()):
        array.close()  # hundreds of examples would keep as many files open
    return found


def answer_ids(pipeline: Pipeline, numbers: list[int], text: str, *, ends: bool) -> list[int]:
    """Random tokens that no tokenizer would choose, special ones among them, then a text, then perhaps the end."""
    tokenizer = pipeline.tokenizer
    end = [tokenizer.reference.eos_token_id] if ends else []
    return [number % len(tokenizer.reference) for number in numbers] + tokenizer.encode(text) + end


def letter_by_letter(pipeline: Pipeline, answer: str) -> list[int]:
    """The tokens of an answer as the template writes it behind its prompt, its end included: more tokens than the text needs."""
    asked = user("x", [])
    prompt = pipeline.template.render([asked])
    text = pipeline.template.render([asked, {"role": "assistant", "content": answer}], add_generation_prompt=False)[len(prompt) :]
    end = text.index(answer) + len(answer)
    last_id = pipeline.tokenizer.encode(prompt)[-1]
    letters = [token_id for letter in text[:end] for token_id in pipeline.tokenizer.encode_after(last_id, letter)]
    return letters + [token_id for token_id in pipeline.tokenizer.encode(text[end:])[:1] if pipeline.tokenizer.is_special(token_id)]


def assert_reads_as_the_template_writes(pipeline: Pipeline, prompt: TurnPrompt, messages: list[dict[str, Any]]) -> None:
    fresh = turn(pipeline, messages)
    decode = functools.partial(pipeline.tokenizer.decode, skip_special_tokens=False)
    assert decode(prompt.prompt.token_ids) == decode(fresh.prompt.token_ids)
    assert "".join(segment.text for segment in prompt.transcript.segments) == fresh.transcript.segments[0].text
    assert prompt.transcript.token_ids == prompt.prompt.token_ids
    assert [image.content_hash for image in prompt.prompt.images] == [image.content_hash for image in fresh.prompt.images]
    rows = [[(span.image, span.offset + row) for span in p.spans for row in range(span.num_tokens)] for p in (prompt.prompt, fresh.prompt)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", TEXT_MODELS + IMAGE_MODELS)
@given(turns=st.lists(st.tuples(ASKED, ANSWERED), min_size=2, max_size=4))
@settings(max_examples=25, deadline=None)
def test_what_the_engine_gets_is_the_templates_text_of_the_whole_conversation(name: str, turns: list[Any]) -> None:
    pipeline = pipeline_of(name)
    messages: list[dict[str, Any]] = []
    known = NOTHING

    for (text, pictures), (numbers, ends, words) in turns:
        messages.append(user(text, pictures if pipeline.family else []))
        prompt = turn(pipeline, messages, known)
        assert_reads_as_the_template_writes(pipeline, prompt, messages)
        ids = answer_ids(pipeline, numbers, words, ends=ends)
        known = pipeline.with_answer(prompt.transcript, ids)
        messages.append({"role": "assistant", "content": pipeline.tokenizer.decode(ids)})


@pytest.mark.parametrize("name", [*TEXT_MODELS, "qwen2_5_vl", EMBEDDED])
def test_a_later_turn_begins_with_the_tokens_of_the_earlier_ones(name: str) -> None:
    """Although the answer's tokens are not those that its text would be cut into."""
    pipeline = pipeline_of(name)
    messages = [user("How many?", ["wide"] if pipeline.family else [])]
    first = turn(pipeline, messages)
    ids = letter_by_letter(pipeline, "There")
    messages += [{"role": "assistant", "content": pipeline.tokenizer.decode(ids)}, user("And now?", [])]

    second = turn(pipeline, messages, pipeline.with_answer(first.transcript, ids))

    earlier = [*first.prompt.token_ids, *ids]
    assert list(second.prompt.token_ids[: len(earlier)]) == earlier
    assert second.num_known_tokens == len(earlier)
    assert second.prompt.cache_keys[: len(first.prompt.cache_keys)] == first.prompt.cache_keys
    assert_reads_as_the_template_writes(pipeline, second, messages)


def test_an_answer_that_the_template_writes_otherwise_costs_its_own_tokens_alone() -> None:
    """LLaVA's template puts a space before an answer, also before one that begins with a space."""
    pipeline = pipeline_of("llava")
    messages = [user("How many?", ["wide"])]
    first = turn(pipeline, messages)
    ids = pipeline.tokenizer.encode(" There")
    messages += [{"role": "assistant", "content": " There"}, user("And now?", [])]

    second = turn(pipeline, messages, pipeline.with_answer(first.transcript, ids))

    assert second.num_known_tokens == len(first.prompt.token_ids)
    assert_reads_as_the_template_writes(pipeline, second, messages)


def test_a_picture_that_changes_the_system_text_costs_the_known_tokens_and_nothing_else() -> None:
    """The embedded model's template has another system sentence for chats with pictures."""
    pipeline = pipeline_of(EMBEDDED)
    first = turn(pipeline, [user("Hello", [])])
    messages = [user("Hello", []), {"role": "assistant", "content": "Hi."}, user("And this?", ["wide"])]

    second = turn(pipeline, messages, first.transcript)

    assert second.num_known_tokens == 0
    assert_reads_as_the_template_writes(pipeline, second, messages)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_an_answer_that_spells_a_picture_is_read_as_words(name: str) -> None:
    pipeline = pipeline_of(name)
    assert pipeline.family
    messages = [user("What?", ["wide"])]
    first = turn(pipeline, messages)
    forged = [*pipeline.tokenizer.encode("See: "), pipeline.family.image_token_id]
    messages += [{"role": "assistant", "content": f"See: {pipeline.family.image_token}"}, user("Why?", [])]

    second = turn(pipeline, messages, pipeline.with_answer(first.transcript, forged))

    assert len(first.prompt.token_ids) <= second.num_known_tokens < len(first.prompt.token_ids) + len(forged)
    assert second.prompt.token_ids.count(pipeline.family.image_token_id) == first.prompt.token_ids.count(pipeline.family.image_token_id)


def test_tokens_of_another_tokenizer_are_not_known() -> None:
    pipeline = pipeline_of("llama")
    first = turn(pipeline, [user("Hello", [])])
    messages = [user("Hello", []), {"role": "assistant", "content": "Hi."}, user("And?", [])]

    assert turn(pipeline, messages, first.transcript).num_known_tokens == len(first.prompt.token_ids)
    assert turn(pipeline, messages, replace(first.transcript, tokenizer="another")).num_known_tokens == 0


def test_kept_files_reach_the_vision_service_in_place_of_their_names() -> None:
    images = FakeImages("llava", PICTURES)
    pipeline = Pipeline.load(tiny_folder("llava"), images=images)

    asyncio.run(pipeline.turn_prompt([user("What?", ["wide", "dot"])], pictures={"picture:wide": b"file"}))

    assert [ref.data for ref in images.asked] == [b"file", None]
    pipeline.close()


def test_a_text_model_refuses_pictures_before_anything_is_fetched() -> None:
    with pytest.raises(ImagesNotSupportedError, match="image_url: this model takes no pictures"):
        asyncio.run(pipeline_of("llama").fetch_pictures([ImageRef("http://x/", "image_url")], limit_bytes=1))
