"""The training's batches: what is asked of the model is marked, what is printed is spelled, and evaluation keeps to its own phrasings."""

import random

import pytest
import torch

from assets.demo_model.assemble import build_tokenizer
from assets.demo_model.batches import NUM_ROWS, ROW_LENGTH, Batch, Packer
from assets.demo_model.questions import PHRASINGS, phrasings
from assets.demo_model.scenes import sample_scene
from assets.demo_model.text_prompts import Exchange
from assets.demo_model.train import find_gguf


@pytest.fixture(scope="module")
def packer() -> Packer:
    return Packer(build_tokenizer(find_gguf()))


def pack(packer: Packer, *, is_evaluation: bool = False, texts: tuple[Exchange, ...] = ()) -> Batch:
    scenes = [sample_scene(seed, with_text=seed % 2 == 0) for seed in range(8)]
    return packer.pack(scenes, random.Random(0), is_evaluation=is_evaluation, texts=texts)


def strings(packer: Packer, batch: Batch, *, is_answer: bool) -> list[str]:
    """Each question's prompt or answer."""
    kept = batch.is_answer == is_answer
    turns = [batch.row_ids[kept & (batch.turn_ids == turn)] for turn in range(len(batch.tasks))]
    return [packer.tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in turns]


def test_shapes_are_those_of_the_layout(packer: Packer) -> None:
    batch = pack(packer)

    assert batch.row_ids.shape == batch.is_answer.shape == batch.turn_ids.shape == (8, NUM_ROWS, ROW_LENGTH)
    assert batch.layout.past_mask.shape == (8, NUM_ROWS, ROW_LENGTH, batch.prefix_ids.shape[1])
    assert batch.is_image.sum(-1).tolist() == [64] * 8


def test_every_answer_ends_its_turn_and_a_turn_sees_only_itself(packer: Packer) -> None:
    batch = pack(packer, is_evaluation=True)

    assert all(answer.endswith(".<|im_end|>") for answer in strings(packer, batch, is_answer=True))
    turns = batch.turn_ids[..., :, None], batch.turn_ids[..., None, :]
    is_seen = batch.layout.own_mask & (turns[0] >= 0) & (turns[1] >= 0)
    assert torch.equal((turns[0] == turns[1]) & is_seen, is_seen)


@pytest.mark.parametrize("string", ["STOP", "EXIT", "XQZ", "GO", "4711"])
def test_printed_characters_are_one_token_each(packer: Packer, string: str) -> None:
    answer = f"The text says {string}.<|im_end|>"
    tokens = packer._spelled(answer)

    assert packer.tokenizer.decode(tokens, skip_special_tokens=False) == answer
    assert [packer.tokenizer.id_to_token(token) for token in tokens][-2 - len(string) : -2] == list(string)


def test_each_side_uses_its_own_phrasings_only(packer: Packer) -> None:
    for is_evaluation in (False, True):
        other = [p for task in PHRASINGS for p in phrasings(task, is_evaluation=not is_evaluation) if "{" not in p]
        prompts = strings(packer, pack(packer, is_evaluation=is_evaluation), is_answer=False)
        assert prompts
        assert not any(phrase + "<|im_end|>" in prompt for phrase in other for prompt in prompts)


def test_a_text_chat_takes_a_row_of_its_own_that_sees_no_picture(packer: Packer) -> None:
    batch = pack(packer, texts=(Exchange("What is tea?", "Tea is a drink.", True),))
    row = packer.tokenizer.decode(batch.row_ids[0, -1].tolist(), skip_special_tokens=False)

    assert "What is tea?" in row
    assert "Tea is a drink.<|im_end|>" in row
    assert not batch.layout.past_mask[0, -1].any()
    assert batch.is_answer[0, -1].any()
    assert (batch.turn_ids[0, -1] == -1).all()
