"""Seeded conversations with 0, 1 and 3 pictures of different sizes, as the reference takes them and as ours does."""

import asyncio
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.request import Prompt
from tests.equality.harness import Answer, reference_answer
from tests.image_fixtures import FakeImages, picture, reference_model, reference_processor, tiny_folder
from vlm_server.pipeline import Pipeline

WORDS = ("what", "where", "how many", "red", "circle", "square", "picture", "left of", "the", "a", "is", "in", "describe", "12", "please")
PICTURE_COUNTS = (1, 0, 3)


@dataclass(frozen=True)
class Case:
    """One conversation. In a turn a number stands for a picture."""

    turns: list[list[str | int]]
    pictures: list[np.ndarray]


def draw_case(seed: int, draw_picture: Callable[[int], np.ndarray] | None = None) -> Case:
    """draw_picture: (height, width, 3) uint8 from a seed; None: noise of any size."""
    rng = random.Random(seed)
    count = PICTURE_COUNTS[seed % len(PICTURE_COUNTS)]
    pictures = [(draw_picture or _noise)(seed * 8 + i) for i in range(count)]
    turns: list[list[str | int]] = [[_words(rng)] for _ in range(rng.choice((1, 3)))]
    for number in range(count):
        turn = turns[rng.randrange(0, len(turns), 2)]  # pictures are the user's
        turn.insert(rng.randrange(len(turn) + 1), number)
        turn.append(_words(rng))
    order = iter(range(count))
    turns = [[next(order) if isinstance(part, int) else part for part in turn] for turn in turns]
    return Case(turns, pictures)


def our_prompts(name: str, cases: list[Case]) -> list[Prompt]:
    return asyncio.run(_our_prompts(name, cases))


async def _our_prompts(name: str, cases: list[Case]) -> list[Prompt]:
    pictures = {f"{i}-{number}": pixels for i, case in enumerate(cases) for number, pixels in enumerate(case.pictures)}
    pipeline = Pipeline.load(tiny_folder(name), images=FakeImages(name, pictures))
    try:
        return [await pipeline.chat_prompt(_messages(case, functools.partial(_url_part, i))) for i, case in enumerate(cases)]
    finally:
        pipeline.close()


def _url_part(case: int, number: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"picture:{case}-{number}"}}


def their_answers(name: str, cases: list[Case], *, num_new_tokens: int) -> list[Answer]:
    model = reference_model(name)
    ends = model.generation_config.eos_token_id
    end_ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    inputs = [_reference_inputs(name, case) for case in cases]
    return [reference_answer(model, each, num_new_tokens=num_new_tokens, eos_token_ids=end_ids) for each in inputs]


def _reference_inputs(name: str, case: Case) -> dict[str, torch.Tensor]:
    messages = _messages(case, lambda number: {"type": "image", "image": Image.fromarray(case.pictures[number])})
    outputs = reference_processor(name).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return dict(outputs)


def _messages(case: Case, picture_part: Any) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [
        {
            "role": roles[number % 2],
            "content": [picture_part(part) if isinstance(part, int) else {"type": "text", "text": part} for part in turn],
        }
        for number, turn in enumerate(case.turns)
    ]


def _noise(seed: int) -> np.ndarray:
    rng = random.Random(seed)
    return picture((rng.randrange(8, 160), rng.randrange(8, 160)), seed)


def _words(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randrange(1, 12)))
