"""The embedded model under every way that the engine has of computing the same thing: each must give the reference's tokens."""

from typing import Any

import numpy as np
import pytest

from assets.demo_model.scenes import render, sample_scene
from engine.request import Prompt
from tests.equality.harness import Answer, RecordingEngine, assert_equal
from tests.equality.image_cases import Case, draw_case, our_prompts, their_answers
from tests.image_fixtures import EMBEDDED, tiny_folder

NUM_NEW_TOKENS = 64


def draw_scene_case(seed: int) -> Case:
    return draw_case(seed, lambda picture_seed: np.asarray(render(sample_scene(picture_seed))))


@pytest.fixture(scope="module")
def prompts(num_embedded_prompts: int) -> list[Prompt]:
    """A third each with no, one and three pictures; half of them in one turn, half after two earlier ones."""
    return our_prompts(EMBEDDED, [draw_scene_case(seed) for seed in range(num_embedded_prompts)])


@pytest.fixture(scope="module")
def references(num_embedded_prompts: int) -> list[Answer]:
    return their_answers(EMBEDDED, [draw_scene_case(seed) for seed in range(num_embedded_prompts)], num_new_tokens=NUM_NEW_TOKENS)


def engine_with(**settings: Any) -> RecordingEngine:
    return RecordingEngine(tiny_folder(EMBEDDED), **{"session_len": 1024, **settings})


@pytest.mark.parametrize("budget", [16, 64, 4096])
def test_all_prompts_at_once_equal_the_reference_under_any_prefill_budget(budget, prompts, references):
    with engine_with(max_prefill_token_num=budget) as engine:
        answers = engine.answers(prompts, num_new_tokens=NUM_NEW_TOKENS)

    assert_equal(answers, references)
    assert engine.engine.stats().max_batched_requests > 4


def test_prompts_alone_equal_the_reference_with_the_prefix_cache_cold_and_warm(prompts, references):
    with engine_with() as engine:
        cold = engine.answers(prompts, num_new_tokens=NUM_NEW_TOKENS, together=False)
        warm = engine.answers(prompts, num_new_tokens=NUM_NEW_TOKENS)
        stats = engine.engine.stats()

    assert_equal(cold, references)
    assert_equal(warm, references)
    assert stats.num_cached_prompt_tokens > sum(len(prompt.token_ids) for prompt in prompts) / 2


def test_preempted_prompts_equal_the_reference(prompts, references):
    with engine_with(cache_max_entry_count=48, session_len=640) as engine:
        answers = engine.answers(prompts, num_new_tokens=NUM_NEW_TOKENS)
        stats = engine.engine.stats()

    assert_equal(answers, references)
    assert stats.num_preemptions > 0


@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.full)])
def test_tensor_parallel_ranks_equal_the_reference(tp, prompts, references):
    """Three KV groups: 2 + 1 on two ranks; 1 + 1 + 1 + 0 on four."""
    with engine_with(tp=tp) as engine:
        answers = engine.answers(prompts, num_new_tokens=NUM_NEW_TOKENS)

    assert_equal(answers, references)
