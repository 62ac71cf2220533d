"""Tiny random image-text checkpoints of every family: pictures, prompts and decoding together, as the reference does them."""

from dataclasses import replace

import pytest

from engine.request import ImageSpan, Prompt, make_cache_keys
from tests.equality.harness import Answer, RecordingEngine, assert_equal
from tests.equality.image_cases import draw_case, our_prompts, their_answers
from tests.image_fixtures import tiny_folder
from tests.tiny_models import image_model_names

NUM_NEW_TOKENS = 64
DIFFERENT = r"logits differ|different token"
TENSOR_PARALLEL = ("llava", "qwen2_5_vl")


@pytest.fixture(scope="module", params=image_model_names())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def prompts(name: str, num_prompts: int) -> list[Prompt]:
    return our_prompts(name, [draw_case(seed) for seed in range(num_prompts)])


@pytest.fixture(scope="module")
def references(name: str, num_prompts: int) -> list[Answer]:
    return their_answers(name, [draw_case(seed) for seed in range(num_prompts)], num_new_tokens=NUM_NEW_TOKENS)


def test_a_batch_in_small_chunks_gives_the_references_tokens(name, prompts, references):
    with RecordingEngine(tiny_folder(name), max_prefill_token_num=16, max_batch_size=5) as engine:
        answers = engine.answers(prompts, num_new_tokens=NUM_NEW_TOKENS)

    assert_equal(answers, references)
    assert max(len(plan.chunks) for plan in engine.plans) == 5


def test_each_prompt_alone_gives_the_references_tokens_cold_and_warm(name, prompts, references):
    with RecordingEngine(tiny_folder(name)) as engine:
        cold = engine.answers(prompts[:4], num_new_tokens=NUM_NEW_TOKENS, together=False)
        warm = engine.answers(prompts[:4], num_new_tokens=NUM_NEW_TOKENS, together=False)
        stats = engine.engine.stats()

    assert_equal(cold, references[:4])
    assert_equal(warm, references[:4])
    assert stats.num_cached_prompt_tokens > 0


def test_the_next_pictures_rows_in_a_pictures_place_are_noticed(name, prompts, references):
    number, prompt = next((i, prompt) for i, prompt in enumerate(prompts) if len(prompt.images) == 3)
    swapped = with_swapped_rows(prompt)

    with RecordingEngine(tiny_folder(name)) as engine:
        answers = engine.answers([swapped], num_new_tokens=NUM_NEW_TOKENS)

    with pytest.raises(AssertionError, match=DIFFERENT):
        assert_equal(answers, [references[number]])


def test_a_shifted_position_is_noticed(name, prompts, references):
    if name == "gemma3":  # its decoder takes one axis, which the engine draws from the slots
        return
    number, prompt = next((i, prompt) for i, prompt in enumerate(prompts) if prompt.images)
    axes = prompt.positions or (tuple(range(len(prompt.token_ids))),) * 3
    half = len(prompt.token_ids) // 2
    shifted = tuple(tuple(position + (2 if slot >= half else 0) for slot, position in enumerate(axis)) for axis in axes)

    with RecordingEngine(tiny_folder(name)) as engine:
        moved = replace(prompt, positions=shifted, position_delta=prompt.position_delta + 2)
        answers = engine.answers([moved], num_new_tokens=NUM_NEW_TOKENS)

    with pytest.raises(AssertionError, match=DIFFERENT):
        assert_equal(answers, [references[number]])


@pytest.mark.parametrize("family", TENSOR_PARALLEL)
def test_two_tensor_parallel_ranks_give_the_references_tokens(family, num_prompts):
    cases = [draw_case(seed) for seed in range(num_prompts)]

    with RecordingEngine(tiny_folder(family), tp=2, max_prefill_token_num=32) as engine:
        answers = engine.answers(our_prompts(family, cases), num_new_tokens=NUM_NEW_TOKENS)

    assert_equal(answers, their_answers(family, cases, num_new_tokens=NUM_NEW_TOKENS))


def with_swapped_rows(prompt: Prompt) -> Prompt:
    """The same prompt, the first picture's slots taking the second one's first row."""
    spans = tuple(
        ImageSpan(span.start + row, 1, 1, 0, span.is_atomic) if span.image == 0 else span
        for span in prompt.spans
        for row in range(span.num_tokens if span.image == 0 else 1)
    )
    return replace(prompt, spans=spans, cache_keys=make_cache_keys(prompt.token_ids, prompt.images, spans))
