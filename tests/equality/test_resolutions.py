"""Pictures at resolutions that requests ask for, from message to tokens: as the reference generates with the same settings."""

import asyncio
from typing import Any

import pytest
from PIL import Image

from engine.request import Prompt
from tests.equality.harness import RecordingEngine, assert_equal, reference_answer
from tests.image_fixtures import FakeImages, picture, reference_model, reference_processor, tiny_folder
from vlm_server.pipeline import Pipeline

NUM_NEW_TOKENS = 16
PICTURES = {"long": picture((300, 900)), "small": picture((40, 60), seed=1)}

# What the pictures' parts and the request say, and the settings of the reference's processor.
CROPS = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20}
ASKED = [
    pytest.param("gemma3", {"detail": "high"}, {}, {"do_pan_and_scan": True}, id="crops"),
    pytest.param("gemma3", {}, CROPS, CROPS, id="small crops", marks=pytest.mark.full),
    pytest.param("idefics3", {"detail": "low"}, {}, {"do_image_splitting": False}, id="one tile"),
    pytest.param("idefics3", {}, {"size": {"longest_edge": 60}}, {"size": {"longest_edge": 60}}, id="few tiles", marks=pytest.mark.full),
    pytest.param(
        "qwen2_5_vl",
        {"min_pixels": 700, "max_pixels": 900},
        {},
        {"size": {"shortest_edge": 700, "longest_edge": 900}},
        id="few patches",
        marks=pytest.mark.full,
    ),
]


@pytest.mark.parametrize(("name", "part", "settings", "theirs"), ASKED)
def test_an_answer_equals_the_references(name: str, part: dict[str, Any], settings: dict[str, Any], theirs: dict[str, Any]) -> None:
    expected = reference_answer(
        reference_model(name), reference_inputs(name, theirs), num_new_tokens=NUM_NEW_TOKENS, eos_token_ids=end_ids(name)
    )

    prompt = asyncio.run(our_prompt(name, part, settings))
    with RecordingEngine(tiny_folder(name), max_prefill_token_num=16) as engine:
        answers = engine.answers([prompt], num_new_tokens=NUM_NEW_TOKENS)

    assert_equal(answers, [expected])


def end_ids(name: str) -> list[int]:
    ends = reference_model(name).generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def reference_inputs(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    messages = conversation({key: {"type": "image", "image": Image.fromarray(pixels)} for key, pixels in PICTURES.items()})
    outputs = reference_processor(name).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=dict(settings)
    )
    return dict(outputs)


async def our_prompt(name: str, part: dict[str, Any], settings: dict[str, Any]) -> Prompt:
    detail = {"detail": part["detail"]} if "detail" in part else {}
    pixels = {key: value for key, value in part.items() if key != "detail"}
    parts = {key: {"type": "image_url", "image_url": {"url": f"picture:{key}", **detail}, **pixels} for key in PICTURES}
    images = FakeImages(name, PICTURES)
    pipeline = Pipeline.load(tiny_folder(name), images=images)
    try:
        prompt = await pipeline.chat_prompt(conversation(parts), image_settings=settings)
        assert await pipeline.chat_tokens(conversation(parts), image_settings=settings) == list(prompt.token_ids)
        return prompt
    finally:
        pipeline.close()


def conversation(pictures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The small picture between two texts."""
    text = [{"type": "text", "text": text} for text in ("what is left of", "and of the picture")]
    return [{"role": "user", "content": [pictures["long"], text[0], pictures["small"], text[1]]}]
