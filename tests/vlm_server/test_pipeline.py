import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.request import ImageInput, InvalidRequestError, Prompt
from tests.image_fixtures import EMBEDDED, SIZES, FakeImages, images_of, picture, reference_model, reference_processor, tiny_folder
from tests.tiny_gguf import write_gguf
from tests.tiny_models import image_model_names
from vision.config import VisionConfig
from vision.image import MediaError
from vision.media_budgets import Holding, MediaBudgets, held_by
from vlm_server.chat_template import TemplateError
from vlm_server.detokenizer import StopWords
from vlm_server.jinja_process import JinjaProcess
from vlm_server.picture_loading import ImagesNotSupportedError
from vlm_server.pipeline import NUM_THREADS, Pipeline
from vlm_server.stage_timings import StageTimings
from vlm_server.tokenizer import TextTokenizer, load_tokenizer

JINJA = JinjaProcess()  # one for all tests: it takes a second to start
FAMILIES = image_model_names()
PICTURES = {name: picture(size, seed) for seed, (name, size) in enumerate(SIZES.items())}

# In these conversations a part `@name` is a picture, anything else is text.
CONVERSATIONS = {
    "one picture": [("user", ["@wide", "What is in this picture?"])],
    "picture last": [("user", ["What is in this picture?  ", "@tall"])],
    "picture alone": [("user", ["@exact"])],
    "three pictures": [("user", ["First:", "@wide", " and \n\n", "@large", "@small", "How many?\n"])],
    "several turns": [
        ("user", ["@large", "Describe the image please"]),
        ("assistant", ["A red circle."]),
        ("user", ["And this? 你好\n\n", "@tall"]),
    ],
    "pictures of every role": [
        ("user", ["@wide", "Find one like this."]),
        ("assistant", ["@tall", "This one?"]),
        ("tool", ["Found: ", "@small"]),
        ("user", ["And @ this?"]),
    ],
    "equal pictures": [("user", ["@tall", "and", "@small", "and", "@tall", "differ?"])],
    "smallest": [("user", ["@dot", "@exact", "What is left of what?"])],
    "no picture": [("user", ["How many?"]), ("assistant", ["12345"]), ("user", ["def main():\n\n    return"])],
}


@pytest.fixture
async def pipelines() -> AsyncIterator[Any]:
    opened: dict[str, Pipeline] = {}

    def open_pipeline(name: str, **options: Any) -> Pipeline:
        opened[name] = Pipeline.load(tiny_folder(name), images=FakeImages(name, PICTURES), jinja=JINJA, **options)
        return opened[name]

    yield open_pipeline
    for pipeline in opened.values():
        pipeline.close()


def openai_messages(conversation: list[tuple[str, list[str]]]) -> list[dict[str, Any]]:
    def part(text: str) -> dict[str, Any]:
        if text.startswith("@"):
            return {"type": "image_url", "image_url": {"url": f"picture:{text[1:]}"}}
        return {"type": "text", "text": text}

    return [{"role": role, "content": [part(text) for text in content]} for role, content in conversation]


def reference_ids(name: str, conversation: list[tuple[str, list[str]]], **options: Any) -> list[int]:
    def part(text: str) -> dict[str, Any]:
        if text.startswith("@"):
            return {"type": "image", "image": Image.fromarray(PICTURES[text[1:]])}
        return {"type": "text", "text": text}

    messages = [{"role": role, "content": [part(text) for text in content]} for role, content in conversation]
    outputs = reference_processor(name).apply_chat_template(
        messages, **{"add_generation_prompt": True, **options}, tokenize=True, return_dict=True, return_tensors="np"
    )
    return [int(token_id) for token_id in outputs["input_ids"][0]]


def image_slots(prompt: Prompt) -> list[tuple[int, int, int]]:
    """(slot, picture, row of its embedding) of every slot that takes one."""
    return [(span.start + i, span.image, span.offset + i) for span in prompt.spans for i in range(span.num_tokens)]


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
async def test_a_prompts_tokens_equal_the_reference_processors(
    name: str, conversation: list[tuple[str, list[str]]], pipelines: Any
) -> None:
    prompt = await pipelines(name).chat_prompt(openai_messages(conversation))

    assert list(prompt.token_ids) == reference_ids(name, conversation)


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
async def test_a_conversation_is_counted_by_its_pictures_sizes(
    name: str, conversation: list[tuple[str, list[str]]], pipelines: Any
) -> None:
    pipeline = pipelines(name)
    messages = openai_messages(conversation)
    prompt = await pipeline.chat_prompt(messages)

    counted = await pipeline.chat_tokens(messages)

    assert tuple(counted) == prompt.token_ids
    assert len(await pipeline.chat_tokens(messages, add_generation_prompt=False)) < len(counted)


async def test_the_stages_of_a_prompt_are_timed_and_pictures_only_where_there_are_any(pipelines: Any) -> None:
    pipeline = pipelines("llava")
    with_pictures, without = StageTimings(), StageTimings()

    await pipeline.chat_prompt(openai_messages(CONVERSATIONS["three pictures"]), timings=with_pictures)
    await pipeline.chat_prompt(openai_messages(CONVERSATIONS["no picture"]), timings=without)

    assert list(with_pictures.seconds) == ["template", "pictures", "picture-fetch", "picture-decode", "tokenize"]
    assert with_pictures.seconds["picture-fetch"] == 0.5
    assert with_pictures.seconds["picture-decode"] == max(PICTURES[name].size * 1e-6 for name in ("wide", "large", "small"))
    assert list(without.seconds) == ["template", "tokenize"]


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
async def test_spans_cover_every_row_of_every_picture_in_order(
    name: str, conversation: list[tuple[str, list[str]]], pipelines: Any
) -> None:
    pipeline = pipelines(name)

    prompt = await pipeline.chat_prompt(openai_messages(conversation))

    slots = image_slots(prompt)
    assert [slot for slot, _, _ in slots] == [
        i for i, token_id in enumerate(prompt.token_ids) if token_id == pipeline.family.image_token_id
    ]
    names = [part for _, content in conversation for part in content if part.startswith("@")]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    expected = [(numbers[name], row) for name in names for row in range(prompt.images[numbers[name]].num_tokens)]
    assert [(image, row) for _, image, row in slots] == expected
    assert len(prompt.images) == len(numbers)
    assert all(span.is_atomic == (name == "gemma3") for span in prompt.spans)


@pytest.mark.parametrize("name", FAMILIES)
async def test_equal_pictures_are_one_in_as_many_places(name: str, pipelines: Any) -> None:
    """The tokens and keys are those of the reference: see above. Other copies hold no descriptors."""
    pipeline = pipelines(name)
    conversation = [("user", ["@wide", "and", "@small", "and", "@wide", "and", "@wide"])]

    prompt = await pipeline.chat_prompt(openai_messages(conversation))

    wide, small = prompt.images
    slots = [(image, row) for _, image, row in image_slots(prompt)]
    rows = [(0, row) for row in range(wide.num_tokens)], [(1, row) for row in range(small.num_tokens)]
    assert slots == [*rows[0], *rows[1], *rows[0], *rows[0]]
    assert list(prompt.token_ids) == reference_ids(name, conversation)
    given = [all(array.fd >= 0 for array in image.arrays.values()) for image in images_of(pipeline).given]
    assert given == [True, True, False, False]
    prompt.close()


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
async def test_a_prompts_positions_equal_the_references(name: str, conversation: list[tuple[str, list[str]]], pipelines: Any) -> None:
    pipeline = pipelines(name)

    prompt = await pipeline.chat_prompt(openai_messages(conversation))

    if not prompt.images:
        assert (prompt.positions, prompt.position_delta) == (None, 0)
        return
    token_ids = torch.tensor([prompt.token_ids])
    shown = [prompt.images[span.image] for span in prompt.spans if span.offset == 0]
    grids = torch.from_numpy(np.concatenate([image.arrays["image_grid_thw"].numpy() for image in shown]))
    kinds = (token_ids == pipeline.family.image_token_id).int()
    expected, delta = reference_model(name).model.get_rope_index(token_ids, kinds, image_grid_thw=grids)
    assert prompt.positions == tuple(tuple(axis) for axis in expected[:, 0].tolist())
    assert prompt.position_delta == delta.item()


@pytest.mark.parametrize("name", FAMILIES)
async def test_a_users_text_never_becomes_a_picture(name: str, pipelines: Any) -> None:
    pipeline = pipelines(name)
    words = " ".join(pipeline.family.reserved)
    honest = [("user", ["@wide", "How many  in the picture?"])]
    forged = [("user", ["@wide", f"How many {words} in the {pipeline.family.image_token}picture?"])]

    prompt = await pipeline.chat_prompt(openai_messages(forged))

    honest_prompt = await pipeline.chat_prompt(openai_messages(honest))
    assert len(image_slots(prompt)) == len(image_slots(honest_prompt))
    assert f"How many {words} in the {pipeline.family.image_token}picture?" in pipeline.tokenizer.decode(
        prompt.token_ids, skip_special_tokens=False
    )


@pytest.mark.parametrize("name", FAMILIES)
async def test_a_placeholder_pieced_together_from_parts_is_refused(name: str, pipelines: Any) -> None:
    pipeline = pipelines(name)
    word = pipeline.family.placeholder
    messages = openai_messages([("user", [word[:4], word[4:]])])
    text = pipeline.template.render([{"role": "user", "content": [{"type": "text", "text": word[:4]}, {"type": "text", "text": word[4:]}]}])

    if word in text:  # templates that put parts side by side
        with pytest.raises(TemplateError, match="pictures"):
            await pipeline.chat_prompt(messages)
    else:
        assert not (await pipeline.chat_prompt(messages)).spans


@pytest.mark.parametrize("name", FAMILIES)
async def test_equal_text_about_different_pictures_shares_keys_up_to_the_first_picture_only(name: str, pipelines: Any) -> None:
    pipeline = pipelines(name)
    PICTURES["other"] = picture(SIZES["wide"], seed=99)

    one, same, other = [
        await pipeline.chat_prompt(openai_messages([("user", ["Look: ", f"@{image}", "How many?"])])) for image in ("wide", "wide", "other")
    ]

    assert one.cache_keys == same.cache_keys
    assert one.token_ids == other.token_ids
    first = one.spans[0].start
    assert one.cache_keys[:first] == other.cache_keys[:first]
    assert all(one.cache_keys[slot] != other.cache_keys[slot] for slot, _, _ in image_slots(one))


LOOK = {
    "type": "function",
    "function": {"name": "look", "description": "Looks at a <image>.", "parameters": {"type": "object", "properties": {"<image>": {}}}},
}


def tool_turns() -> list[dict[str, Any]]:
    """A call and its result, which is a picture; the words for pictures stand in every other place, escaped in JSON too."""
    arguments = {"<image>": "a <image>", "nested": [{"<image>": "<image>"}]}
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return [
        {"role": "user", "content": "What is in <image>?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "Here: <image>"}, *_part("wide")]},
    ]


def _part(name: str) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": f"picture:{name}"}}]


async def test_tools_calls_and_a_result_with_its_picture_are_in_the_prompt(pipelines: Any) -> None:
    pipeline = pipelines(EMBEDDED)

    prompt = await pipeline.chat_prompt(tool_turns(), tools=[LOOK], template_kwargs={"word": "<image>"})

    text = pipeline.tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
    assert '"description": "Looks at a <image>.", "parameters": {"type": "object", "properties": {"<image>": {}}}' in text
    assert '"arguments": {"<image>": "a <image>", "nested": [{"<image>": "<image>"}]}' in text
    assert len(prompt.images) == 1
    assert text.index("<|im_start|>tool") < text.index("<image>" * prompt.images[0].num_tokens)
    assert await pipeline.chat_tokens(tool_turns(), tools=[LOOK]) == list(prompt.token_ids)


async def test_tools_and_calls_are_written_as_the_reference_writes_them(pipelines: Any) -> None:
    pipeline = pipelines(EMBEDDED)
    messages = [*tool_turns()[:2], {"role": "tool", "tool_call_id": "call_1", "content": "Blue."}]
    plain = json.loads(json.dumps([messages, LOOK]).replace("<image>", "it"))

    prompt = await pipeline.chat_prompt(plain[0], tools=[plain[1]])

    reference = reference_processor(EMBEDDED).tokenizer
    source = (tiny_folder(EMBEDDED) / "chat_template.jinja").read_text()
    expected = reference.apply_chat_template(plain[0], tools=[plain[1]], chat_template=source, add_generation_prompt=True, tokenize=True)
    assert list(prompt.token_ids) == expected["input_ids"]


@pytest.mark.parametrize("name", FAMILIES)
async def test_the_last_message_is_continued_as_the_reference_does(name: str, pipelines: Any) -> None:
    conversation = [("user", ["@wide", "What is it?"]), ("assistant", ["It is a"])]
    pipeline = pipelines(name)

    prompt = await pipeline.chat_prompt(openai_messages(conversation), add_generation_prompt=False, continue_final_message=True)

    expected = reference_ids(name, conversation, add_generation_prompt=False, continue_final_message=True)
    assert list(prompt.token_ids) == expected
    assert pipeline.tokenizer.decode(prompt.token_ids, skip_special_tokens=False).endswith("It is a")


async def test_tenants_share_no_cache_keys(pipelines: Any) -> None:
    pipeline = pipelines("llava")
    messages = openai_messages([("user", ["How many?"])])

    one, two = [await pipeline.chat_prompt(messages, tenant=tenant) for tenant in ("one", "two")]

    assert one.token_ids == two.token_ids
    assert one.cache_keys[0] != two.cache_keys[0]


async def test_tenants_share_no_embedding_and_take_turns_by_their_names(pipelines: Any) -> None:
    pipeline = pipelines("llava")
    messages = openai_messages([("user", ["@wide"])])

    one, two, again = [await pipeline.chat_prompt(messages, tenant=tenant) for tenant in ("one", "two", "two")]

    assert len({one.images[0].content_hash, two.images[0].content_hash}) == 2
    assert two.images[0].content_hash == again.images[0].content_hash
    assert set(one.cache_keys).isdisjoint(two.cache_keys[slot] for slot, _, _ in image_slots(two))
    assert (one.tenant, two.tenant) == ("one", "two")


async def test_where_caches_are_shared_tenants_differ_in_nothing_but_their_turns(pipelines: Any) -> None:
    pipeline = pipelines("llava", shares_caches=True)
    messages = openai_messages([("user", ["How many?", "@wide"])])

    one, two, nobodys = [await pipeline.chat_prompt(messages, tenant=tenant) for tenant in ("one", "two", "")]

    assert one.cache_keys == two.cache_keys == nobodys.cache_keys
    assert one.images[0].content_hash == two.images[0].content_hash
    assert (one.tenant, two.tenant) == ("one", "two")
    assert pipeline.text_prompt("How many?", tenant="one").cache_keys == pipeline.text_prompt("How many?").cache_keys


@dataclass
class Announced:
    """Takes the place of the engine's announcements."""

    hashes: list[bytes] = field(default_factory=list)
    ends: list[bool] = field(default_factory=list)

    def add(self, image: ImageInput) -> None:
        self.hashes.append(image.content_hash)

    def end(self, *, request_follows: bool) -> None:
        self.ends.append(request_follows)


async def test_all_pictures_but_the_last_are_announced_as_the_request_will_name_them(pipelines: Any) -> None:
    announced = Announced()
    pipeline = pipelines("llava", announce=lambda: announced)

    prompt = await pipeline.chat_prompt(openai_messages([("user", ["@wide", "@tall", "@small"])]), tenant="one")

    assert announced.hashes == [image.content_hash for image in prompt.images][:-1]
    assert announced.ends == [True]


async def test_a_single_picture_is_not_announced(pipelines: Any) -> None:
    announced = Announced()
    pipeline = pipelines("llava", announce=lambda: announced)

    await pipeline.chat_prompt(openai_messages([("user", ["@wide"])]))

    assert (announced.hashes, announced.ends) == ([], [])


async def test_announced_pictures_are_withdrawn_where_another_one_fails(pipelines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    announced = Announced()
    pipeline = pipelines("llava", announce=lambda: announced)

    async def load_first_and_fail(refs: Any, *, on_loaded: Any, **options: Any) -> None:
        on_loaded(images_of(pipeline)._load(refs[0]))
        raise MediaError("image_fetch_timeout", "too slow")

    monkeypatch.setattr(images_of(pipeline), "load", load_first_and_fail)
    with pytest.raises(MediaError):
        await pipeline.chat_prompt(openai_messages([("user", ["@wide", "@tall"])]))

    assert (len(announced.hashes), announced.ends) == (1, [False])


async def test_the_vision_service_is_told_which_part_a_picture_came_from(pipelines: Any) -> None:
    pipeline = pipelines("llava")
    messages = openai_messages([("user", ["How many?"]), ("user", ["Here: ", "@wide", "@tall"])])
    messages[1]["content"][2]["image_url"] |= {"detail": "low", "max_pixels": 4000}

    await pipeline.chat_prompt(messages)

    first, second = images_of(pipeline).asked
    assert first.param == "messages[1].content[1].image_url"
    assert second.param == "messages[1].content[2].image_url"
    assert (first.options.detail, first.options.max_pixels) == ("auto", None)
    assert (second.options.detail, second.options.max_pixels) == ("low", 4000)


async def test_a_picture_for_a_text_model_is_refused_by_its_part(text_pipeline: Pipeline) -> None:
    with pytest.raises(ImagesNotSupportedError, match=r"messages\[0\]\.content\[1\]\.image_url: this model takes no pictures") as caught:
        await text_pipeline.chat_prompt(openai_messages([("user", ["See", "@wide"])]))

    assert caught.value.param == "messages[0].content[1].image_url"


@pytest.fixture
async def text_pipeline(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pipeline]:
    pipeline = Pipeline.load(tiny_folder("llama"), jinja=JINJA)
    yield pipeline
    pipeline.close()


async def test_a_text_models_prompt_equals_its_tokenizers_own(text_pipeline: Pipeline) -> None:
    messages = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "How many <image>? 你好"}]

    prompt = await text_pipeline.chat_prompt(messages)

    expected = text_pipeline.tokenizer.reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert list(prompt.token_ids) == expected
    assert (prompt.images, prompt.spans, prompt.positions, prompt.position_delta) == ((), (), None, 0)


async def test_a_text_prompt_is_its_tokens_and_no_more(text_pipeline: Pipeline) -> None:
    text = text_pipeline.text_prompt("How many?")
    ids = text_pipeline.text_prompt(text.token_ids)

    assert text_pipeline.tokenizer.decode(text.token_ids) == "How many?"
    assert ids == text


@pytest.mark.parametrize("name", ["qwen2", "internlm2", "gemma3_text"])
async def test_every_text_model_has_its_pipeline(name: str) -> None:
    pipeline = Pipeline.load(tiny_folder(name))

    prompt = await pipeline.chat_prompt([{"role": "user", "content": "How many?"}])
    pipeline.close()

    assert pipeline.family is None
    text = pipeline.tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n")


async def test_a_gguf_file_has_its_pipeline(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", TextTokenizer(load_tokenizer(tiny_folder("llama"))))
    pipeline = Pipeline.load(tmp_path / "tiny.gguf")

    prompt = await pipeline.chat_prompt([{"role": "user", "content": "How many?"}])
    pipeline.close()

    assert pipeline.tokenizer.decode(prompt.token_ids, skip_special_tokens=False) == "gguf: How many?"


async def test_long_texts_leave_the_event_loop_free(text_pipeline: Pipeline) -> None:
    messages = [{"role": "user", "content": "What is in this picture? 你好 " * 20_000}]
    longest_s = 0.0

    async def tick() -> None:
        nonlocal longest_s
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(0)
            longest_s = max(longest_s, time.monotonic() - before_s)

    ticking = asyncio.create_task(tick())
    before_s = time.monotonic()
    prompt = await text_pipeline.chat_prompt(messages)
    took_s = time.monotonic() - before_s
    ticking.cancel()

    assert len(prompt.token_ids) > 100_000
    assert longest_s < took_s / 2


async def test_an_empty_prompt_is_refused(text_pipeline: Pipeline) -> None:
    with pytest.raises(InvalidRequestError, match="at least one"):
        text_pipeline.text_prompt("")


async def test_a_bare_text_never_becomes_a_picture(pipelines: Any) -> None:
    pipeline = pipelines("llava")

    prompt = pipeline.text_prompt("How many <image> are <image> here?")

    assert pipeline.family.image_token_id not in prompt.token_ids
    assert pipeline.tokenizer.decode(prompt.token_ids) == "How many <image> are <image> here?"
    with pytest.raises(InvalidRequestError, match="stands for a picture"):
        pipeline.text_prompt([5, pipeline.family.image_token_id])


async def test_pictures_of_a_refused_conversation_are_given_back(pipelines: Any, tmp_path: Path) -> None:
    template = "{% for part in messages[0]['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    (tmp_path / "side_by_side.jinja").write_text(template)
    pipeline = pipelines("llava", chat_template=str(tmp_path / "side_by_side.jinja"))

    with pytest.raises(TemplateError, match="wrote 2 of <image> for 1 pictures"):
        await pipeline.chat_prompt(openai_messages([("user", ["<ima", "ge>", "@wide"])]))

    assert [array.fd for image in images_of(pipeline).given for array in image.arrays.values()] == [-1, -1]


@pytest.mark.parametrize("name", FAMILIES)
async def test_swapped_pictures_are_other_images_in_equal_places(name: str, pipelines: Any) -> None:
    pipeline = pipelines(name)
    PICTURES["other"] = picture(SIZES["wide"], seed=99)

    one, two = [
        await pipeline.chat_prompt(openai_messages([("user", [f"@{a}", f"@{b}", "Compare."])]))
        for a, b in (("wide", "other"), ("other", "wide"))
    ]

    assert one.token_ids == two.token_ids
    assert [image.content_hash for image in one.images] == [image.content_hash for image in reversed(two.images)]
    arrays = [[image.arrays["pixel_values"].numpy() for image in prompt.images] for prompt in (one, two)]
    assert np.array_equal(arrays[0][0], arrays[1][1])
    assert not np.array_equal(arrays[0][0], arrays[1][0])


@pytest.mark.parametrize("conversation", ["one picture", "picture last", "picture alone", "three pictures", "several turns", "no picture"])
async def test_a_built_in_templates_tokens_equal_those_of_the_models_own(conversation: str, pipelines: Any) -> None:
    """Qwen2-VL's own template is `qwen`, with a frame around each picture."""
    own, built_in = pipelines("qwen2_vl"), pipelines("qwen2_5_vl", chat_template="qwen")
    messages = openai_messages(CONVERSATIONS[conversation])

    assert (await built_in.chat_prompt(messages)).token_ids == (await own.chat_prompt(messages)).token_ids


async def test_a_built_in_template_leaves_the_first_token_to_the_tokenizer() -> None:
    pipeline = Pipeline.load(tiny_folder("internlm2"), chat_template="internlm2", jinja=JINJA)
    bos = pipeline.tokenizer.reference.bos_token_id

    token_ids = (await pipeline.chat_prompt([{"role": "user", "content": "hi"}])).token_ids
    pipeline.close()

    assert bos is not None
    assert (token_ids[0], token_ids.count(bos)) == (bos, 1)


async def test_a_picture_of_llava_stands_on_a_line_of_its_own(pipelines: Any) -> None:
    pipeline = pipelines("llava", chat_template="vicuna", meta_instruction="S.")

    prompt = await pipeline.chat_prompt(openai_messages(CONVERSATIONS["one picture"]))

    text = pipeline.tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
    before, _, after = text.partition("<image>")
    assert before == "S. USER: "
    assert after.replace("<image>", "") == "\nWhat is in this picture? ASSISTANT:"


async def test_stop_words_are_tokens_where_the_tokenizer_has_them_whole(pipelines: Any) -> None:
    arguments = '{"stop_words": ["<|im_end|>", "Human:", "the", "<|im_end|>x"]}'
    pipeline = pipelines("qwen2_vl", chat_template="chatml", chat_template_args=arguments)

    assert pipeline.stop_words.token_ids == (pipeline.tokenizer.token_id("<|im_end|>"),)
    assert pipeline.stop_words.strings == ("Human:", "the", "<|im_end|>x")
    assert pipelines("llava").stop_words == StopWords()


def tasks_of(owner: str, pipeline: Pipeline, works: Sequence[Callable[[], object]]) -> list[asyncio.Task[object]]:
    with held_by(Holding(MediaBudgets(VisionConfig()), owner)):
        return [asyncio.create_task(pipeline.in_thread(work)) for work in works]


async def test_a_client_with_many_texts_leaves_others_a_place(text_pipeline: Pipeline) -> None:
    is_over, ended = threading.Event(), list[str]()

    def work(owner: str) -> None:
        assert is_over.wait(30)
        ended.append(owner)

    tasks = tasks_of("greedy", text_pipeline, [partial(work, "greedy")] * 20) + tasks_of("other", text_pipeline, [partial(work, "other")])
    await asyncio.sleep(0)  # until all of them have asked for a place
    is_over.set()
    await asyncio.gather(*tasks)

    assert ended.index("other") <= 2 * NUM_THREADS + 1, "behind those that ran, those before the threads, and one beside it"


async def test_work_that_nobody_waits_for_keeps_its_place_until_it_ends(text_pipeline: Pipeline) -> None:
    is_over, has_begun = threading.Event(), threading.Semaphore(0)

    def work() -> None:
        has_begun.release()
        assert is_over.wait(30)

    tasks = tasks_of("left", text_pipeline, [work] * 20)
    for _ in range(NUM_THREADS):
        assert await asyncio.to_thread(has_begun.acquire, timeout=30)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0)  # the places of those that had not begun are given back

    assert text_pipeline._places.used == NUM_THREADS
    is_over.set()
    assert await text_pipeline.in_thread(lambda: "next") == "next"
