"""Prompts without messages: with pictures at their placeholders they are the prompts of the chats that the template writes as they are."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine.request import InvalidRequestError, Prompt
from tests.image_fixtures import SIZES, FakeImages, picture, reference_processor, tiny_folder
from tests.tiny_models import image_model_names
from vlm_server.jinja_process import JinjaProcess
from vlm_server.picture_loading import ImagesNotSupportedError
from vlm_server.pipeline import Pipeline

FAMILIES = image_model_names()
PICTURES = {name: picture(size, seed) for seed, (name, size) in enumerate(SIZES.items())}
NAMES = ("wide", "small")
IMAGES = [{"url": f"picture:{name}"} for name in NAMES]
FIELDS = ["image_data[0]", "image_data[1]"]
MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "First:"},
            {"type": "image_url", "image_url": IMAGES[0]},
            {"type": "text", "text": " then"},
            {"type": "image_url", "image_url": IMAGES[1]},
            {"type": "text", "text": "How many?"},
        ],
    }
]


@pytest.fixture(scope="module")
def jinja() -> Any:
    process = JinjaProcess()
    yield process
    process.close()


@pytest.fixture
async def pipelines(jinja: JinjaProcess) -> AsyncIterator[Any]:
    opened: list[Pipeline] = []

    def open_pipeline(name: str) -> Pipeline:
        opened.append(Pipeline.load(tiny_folder(name), images=FakeImages(name, PICTURES), jinja=jinja))
        return opened[-1]

    yield open_pipeline
    for pipeline in opened:
        pipeline.close()


def templated(name: str) -> str:
    """The conversation as the reference writes it, a placeholder for each picture."""
    parts = [{"type": "image"} if part["type"] == "image_url" else part for part in MESSAGES[0]["content"]]  # type: ignore[index]
    text = reference_processor(name).apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return text


def assert_same(ours: Prompt, theirs: Prompt) -> None:
    assert ours.token_ids == theirs.token_ids
    assert (ours.spans, ours.positions, ours.position_delta, ours.cache_keys) == (
        theirs.spans, theirs.positions, theirs.position_delta, theirs.cache_keys
    )  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
async def test_pictures_stand_at_the_texts_placeholders(name: str, pipelines: Any) -> None:
    pipeline = pipelines(name)

    prompt = await pipeline.picture_prompt(templated(name), IMAGES, params=FIELDS)

    assert_same(prompt, await pipeline.chat_prompt(MESSAGES))


@pytest.mark.parametrize("name", FAMILIES)
async def test_token_ids_with_all_of_the_pictures_slots_stay_as_they_are(name: str, pipelines: Any) -> None:
    pipeline = pipelines(name)
    chat = await pipeline.chat_prompt(MESSAGES)

    prompt = await pipeline.picture_prompt(list(chat.token_ids), IMAGES, params=FIELDS)

    assert_same(prompt, chat)


@pytest.mark.parametrize("name", FAMILIES)
async def test_placeholders_among_token_ids_are_written_out(name: str, pipelines: Any) -> None:
    pipeline = pipelines(name)
    token_ids = pipeline.tokenizer.encode(templated(name))
    chat = await pipeline.chat_prompt(MESSAGES)

    prompt = await pipeline.picture_prompt(token_ids, IMAGES, params=FIELDS)

    assert [span.num_tokens for span in prompt.spans] == [span.num_tokens for span in chat.spans]
    if name != "gemma3":  # whose pictures begin and end with line breaks, which join those of the text where that is tokenized as one
        first = len(chat.token_ids) - len(prompt.token_ids)  # the token that begins a text, which these ids have not
        assert prompt.token_ids == chat.token_ids[first:]
    assert pipeline.tokenizer.decode(prompt.token_ids) == pipeline.tokenizer.decode(chat.token_ids)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("has_placeholder", [False, True])
async def test_pictures_come_before_a_text_that_has_no_places_for_them(name: str, has_placeholder: bool, pipelines: Any) -> None:
    pipeline = pipelines(name)
    text = f"How{pipeline.family.placeholder if has_placeholder else ''} many?"

    prompt = await pipeline.picture_prompt(text, IMAGES, params=FIELDS)

    last = prompt.spans[-1].start + prompt.spans[-1].num_tokens
    assert {span.image for span in prompt.spans} == {0, 1}
    assert pipeline.tokenizer.decode(prompt.token_ids[:last]).count("How") == 0
    assert pipeline.tokenizer.decode(prompt.token_ids[last:], skip_special_tokens=False).endswith(text)


@pytest.mark.parametrize("name", FAMILIES)
async def test_pictures_come_before_token_ids_without_places_behind_the_first_token(name: str, pipelines: Any) -> None:
    pipeline = pipelines(name)
    token_ids = pipeline.text_tokens("How many?")
    bos = pipeline.tokenizer.reference.bos_token_id

    prompt = await pipeline.picture_prompt(token_ids, IMAGES, params=FIELDS)

    num_first = int(token_ids[0] == bos)
    assert list(prompt.token_ids[:num_first]) == token_ids[:num_first]
    assert list(prompt.token_ids[-len(token_ids) + num_first :]) == token_ids[num_first:]
    assert prompt.token_ids.count(bos) == num_first


@pytest.mark.parametrize("name", FAMILIES)
async def test_another_number_of_placeholders_among_token_ids_is_refused(name: str, pipelines: Any) -> None:
    pipeline = pipelines(name)
    placeholder_id = pipeline.tokenizer.token_id(pipeline.family.placeholder)

    with pytest.raises(InvalidRequestError, match="input_ids: 3 times token"):
        await pipeline.picture_prompt([*pipeline.tokenizer.encode("How"), *[placeholder_id] * 3], IMAGES, params=FIELDS)


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3"])
async def test_a_pictures_slots_cannot_be_taken_apart(name: str, pipelines: Any) -> None:
    pipeline = pipelines(name)
    chat = await pipeline.chat_prompt(MESSAGES)
    first = chat.spans[0].start + 1
    token_ids = [*chat.token_ids[:first], *pipeline.tokenizer.encode("a"), *chat.token_ids[first:]]

    with pytest.raises(InvalidRequestError, match="stand together"):
        await pipeline.picture_prompt(token_ids, IMAGES, params=FIELDS)


async def test_a_model_without_pictures_refuses_them_by_the_fields_name(jinja: JinjaProcess) -> None:
    pipeline = Pipeline.load(tiny_folder("llama"), jinja=jinja)

    with pytest.raises(ImagesNotSupportedError, match=r"image_data\[0\]"):
        await pipeline.picture_prompt("hi", IMAGES, params=FIELDS)
    pipeline.close()
