"""The sampler against hand-made distributions, hand-computed penalties and the reference library's processors."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from engine.request import SamplingParams
from engine.sampler import MASS_TOLERANCE, SamplingRow, sample, uniform

PROBABILITIES = (0.23, 0.20, 0.18, 0.11, 0.10, 0.08, 0.05, 0.03, 0.02)
NUM_DRAWS = 10_000


def make_row(
    *, prompt: Sequence[int] = (), counts: Mapping[int, int] | None = None, num_output: int | None = None, seed: int = 0, **params: Any
) -> SamplingRow:
    counts = counts or {}
    return SamplingRow(SamplingParams(**params), prompt, counts, sum(counts.values()) if num_output is None else num_output, seed)


def log(probabilities: Sequence[float]) -> torch.Tensor:
    return torch.tensor(probabilities).log()[None]


def draw(probabilities: Sequence[float], *, seed: int = 0, num_draws: int = NUM_DRAWS, **params: Any) -> Counter[int]:
    """Tokens of one request's steps over an unchanging distribution."""
    rows = [make_row(num_output=step, seed=seed, **params) for step in range(num_draws)]
    logits = log(probabilities).repeat(num_draws, 1)
    return Counter(token.token_id for token in sample(logits, rows, eos_token_ids=()))


def assert_frequencies(counts: Counter[int], expected: Mapping[int, float]) -> None:
    """Pearson's chi-square below its 99.9 % bound (Wilson-Hilferty), and nothing outside the expected support."""
    assert set(counts) <= set(expected)
    num_draws, total, degrees = sum(counts.values()), sum(expected.values()), len(expected) - 1
    statistic = sum((counts[key] - num_draws * p / total) ** 2 / (num_draws * p / total) for key, p in expected.items())
    bound = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < bound, f"chi-square {statistic:.1f} is not below {bound:.1f}: {counts}"


def greedy(logits: Sequence[float], *, eos: Sequence[int] = (), **row: Any) -> int:
    return sample(torch.tensor([logits]), [make_row(temperature=0.0, **row)], eos_token_ids=eos)[0].token_id


def changed(logits: Sequence[float], *, eos: Sequence[int] = (), **row: Any) -> list[float]:
    """The logits after penalties, bias and masks: `sample` overwrites its argument."""
    tensor = torch.tensor([logits])
    sample(tensor, [make_row(temperature=0.0, **row)], eos_token_ids=eos)
    return tensor[0].tolist()


# Distributions


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_p": 0.6}, 3),
        ({"top_p": 0.61}, 3),  # exactly the mass of three
        ({"top_p": 0.62}, 4),
        ({"top_p": 0.01}, 1),
        ({"top_k": 1}, 1),
        ({"top_k": 4}, 4),
        ({"top_k": 100}, 9),
        ({"min_p": 0.5}, 3),  # at least 0.115
        ({"min_p": 0.4}, 5),  # at least 0.092
        ({"min_p": 1.0}, 1),
        ({"top_k": 4, "top_p": 0.6}, 3),  # top_p of what top_k left: 0.43 of 0.72 is less than 0.6
        ({"top_k": 3, "top_p": 0.7}, 2),  # 0.43 of 0.61 is more than 0.7
        ({"top_k": 100, "top_p": 0.6}, 3),
        ({"top_p": 0.9, "min_p": 0.8}, 2),
        ({}, 9),
    ],
)
def test_exactly_the_promised_tokens_are_kept_in_their_proportions(params: dict[str, Any], kept: int) -> None:
    counts = draw(PROBABILITIES, seed=7, **params)

    assert_frequencies(counts, dict(enumerate(PROBABILITIES[:kept]))) if kept > 1 else None
    assert set(counts) == set(range(kept))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_raises_probabilities_to_its_inverse(temperature: float) -> None:
    counts = draw(PROBABILITIES, seed=1, temperature=temperature)

    assert_frequencies(counts, {token_id: p ** (1 / temperature) for token_id, p in enumerate(PROBABILITIES)})


def test_temperature_comes_before_top_p() -> None:
    """The masses of the first two are 0.34 and 0.25 at temperature 0.5; of the first five together 0.71, of four 0.597 at 2."""
    assert set(draw(PROBABILITIES, temperature=0.5, top_p=0.55)) == {0, 1}
    assert set(draw(PROBABILITIES, temperature=2.0, top_p=0.6)) == {0, 1, 2, 3, 4}


def test_order_of_the_vocabulary_does_not_matter_to_what_is_kept() -> None:
    shuffled = [PROBABILITIES[index] for index in (4, 8, 0, 6, 2, 7, 1, 5, 3)]

    assert set(draw(shuffled, top_p=0.6)) == {2, 4, 6}
    assert set(draw(shuffled, top_k=2)) == {2, 6}


def test_of_equals_at_the_border_the_smaller_token_ids_are_kept() -> None:
    assert set(draw([0.1] * 10, top_p=0.5)) == {0, 1, 2, 3, 4}
    assert set(draw([0.1] * 10, top_k=3)) == {0, 1, 2}
    assert set(draw([1e-3] * 1_000, top_k=100, num_draws=2_000)) == set(range(100))
    assert set(draw([1e-4] * 16_384, top_k=10, num_draws=200)) == set(range(10))


def plain_choice(scores: Sequence[float], row: SamplingRow) -> int:
    """The definition, in double precision: sort, cut, and walk through what is kept in the order of the vocabulary."""
    params, best = row.params, max(scores)
    weights = [math.exp((score - best) / params.temperature) for score in scores]
    order = sorted(range(len(scores)), key=lambda token_id: -scores[token_id])[: params.top_k or None]
    total, mass, kept = sum(weights[token_id] for token_id in order), 0.0, []
    for token_id in order:
        if mass < params.top_p * total * (1 - MASS_TOLERANCE) and weights[token_id] >= params.min_p:
            kept.append(token_id)
        mass += weights[token_id]
    target, mass = uniform(row.seed, row.num_output_tokens) * sum(weights[token_id] for token_id in kept), 0.0
    for token_id in sorted(kept):
        mass += weights[token_id]
        if mass > target:
            return token_id
    raise AssertionError("nothing is kept")


@pytest.mark.parametrize("vocab_size", [50, 5_003, 16_384])
@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])  # from flat, so that everything has to be sorted, to steep
def test_every_choice_is_that_of_the_definition(vocab_size: int, spread: float) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"top_p": 0.9},
        {"top_p": 0.5},
        {"top_k": 40, "top_p": 0.8, "temperature": 0.8},
        {"top_k": 63},
        {"top_k": 64},
        {"top_k": 65, "top_p": 0.99},
        {"top_k": 3_000, "top_p": 0.5, "temperature": 1.5},
        {"min_p": 0.05},
        {"top_p": 0.999, "min_p": 0.01},
    ]
    logits = torch.randn(40, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * spread
    rows = [make_row(seed=index, num_output=index, **kinds[index % len(kinds)]) for index in range(40)]

    tokens = [token.token_id for token in sample(logits.clone(), rows, eos_token_ids=())]

    assert tokens == [plain_choice(scores, row) for scores, row in zip(logits.tolist(), rows, strict=True)]


def test_uniform_numbers_are_uniform_and_depend_on_seed_and_counter() -> None:
    numbers = [uniform(seed, counter) for seed in (0, 1, 2**63, -1) for counter in range(2_500)]

    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    assert_frequencies(Counter(int(number * 20) for number in numbers), dict.fromkeys(range(20), 1.0))


# Reproducibility


def _mixed_rows() -> list[SamplingRow]:
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"top_k": 40, "top_p": 0.8},
        {"top_p": 0.95},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3, "prompt": [1, 2, 3, 3]},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "counts": {5: 2, 9: 1}},
        {"logit_bias": {7: 3.0}, "temperature": 0.7},
    ]
    return [make_row(seed=index, num_output=index * 3, **kinds[index % len(kinds)]) for index in range(16)]


def test_a_row_gets_the_same_token_alone_and_among_fifteen_others() -> None:
    logits = torch.randn(16, 3_000, generator=torch.Generator().manual_seed(0)) * 3
    rows = _mixed_rows()

    together = sample(logits.clone(), rows, eos_token_ids=(0,))
    reverse = sample(logits.flip(0), rows[::-1], eos_token_ids=(0,))[::-1]
    alone = [sample(logits[index : index + 1].clone(), [row], eos_token_ids=(0,))[0] for index, row in enumerate(rows)]

    assert together == alone == reverse


def test_tiny_differences_of_the_logits_do_not_exchange_tokens() -> None:
    """Batched matrix products differ in their last bits; two nearly equal tokens must not swap their parts of [0, 1)."""
    logits = torch.zeros(2_000, 100)
    rows = [make_row(num_output=step, top_p=0.999999) for step in range(2_000)]
    noise = torch.randn(2_000, 100, generator=torch.Generator().manual_seed(0)) * 1e-6

    exact = sample(logits.clone(), rows, eos_token_ids=())
    noisy = sample(logits + noise, rows, eos_token_ids=())

    assert sum(a != b for a, b in zip(exact, noisy, strict=True)) <= 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tokens_are_the_same_on_cuda() -> None:
    logits = torch.randn(16, 50_000, generator=torch.Generator().manual_seed(0)) * 3

    on_cuda = [token.token_id for token in sample(logits.cuda(), _mixed_rows(), eos_token_ids=(0,))]

    assert on_cuda == [token.token_id for token in sample(logits.clone(), _mixed_rows(), eos_token_ids=(0,))]


# Greedy


def test_greedy_takes_the_first_of_equal_tokens() -> None:
    assert greedy([1.0, 3.0, 2.0, 3.0]) == 1
    for vocab_size in (64, 512, 500, 1_000, 49_152):
        logits = torch.zeros(3, vocab_size)
        logits[0, -1] = logits[1, vocab_size // 2] = logits[1, -1] = 1
        tokens = sample(logits, [make_row(temperature=0.0)] * 3, eos_token_ids=())
        assert [token.token_id for token in tokens] == [vocab_size - 1, vocab_size // 2, 0]


def test_greedy_rows_equal_argmax_of_random_logits() -> None:
    logits = torch.randn(8, 151_936 // 8, generator=torch.Generator().manual_seed(0))

    tokens = sample(logits.clone(), [make_row(temperature=0.0)] * 8, eos_token_ids=())

    assert [token.token_id for token in tokens] == logits.argmax(-1).tolist()


def test_tiny_temperatures_are_greedy_instead_of_an_overflow() -> None:
    logits = torch.tensor([[-500.0, 900.0, 899.0]])

    for temperature in (1e-3, 1e-30, 5e-324):
        for params in ({}, {"top_p": 0.5}, {"top_k": 2}):
            assert sample(logits.clone(), [make_row(temperature=temperature, **params)], eos_token_ids=())[0].token_id == 1


# Penalties, bias and masks


def test_repetition_penalty_equals_the_reference_over_prompt_and_output() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    prompts, outputs = [[1, 2, 2, 9], [3], [4, 40], [0, 49]], [[5, 5], [3], [], [7]]
    expected = torch.cat(
        [
            RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), scores[None])
            for penalty, prompt, output, scores in zip((1.3, 0.7, 5.0, 1.0), prompts, outputs, logits, strict=True)
        ]
    )

    rows = [
        make_row(temperature=0.0, repetition_penalty=penalty, prompt=prompt, counts=Counter(output))
        for penalty, prompt, output in zip((1.3, 0.7, 5.0, 1.0), prompts, outputs, strict=True)
    ]
    sample(logits, rows, eos_token_ids=())

    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_presence_penalty_counts_once_and_frequency_penalty_every_time() -> None:
    row = {"prompt": [3], "counts": {0: 1, 1: 4}}

    assert changed([1.0, 1.0, 1.0, 1.0], presence_penalty=0.5, **row) == [0.5, 0.5, 1.0, 1.0]
    assert changed([1.0, 1.0, 1.0, 1.0], frequency_penalty=0.25, **row) == [0.75, 0.0, 1.0, 1.0]
    assert changed([1.0, 1.0, 1.0, 1.0], presence_penalty=-1.0, frequency_penalty=0.5, **row) == [1.5, 0.0, 1.0, 1.0]


def test_repetition_comes_before_the_additive_penalties_and_the_bias() -> None:
    values = changed([2.0, -2.0, 1.0], counts={0: 1, 1: 1}, repetition_penalty=2.0, presence_penalty=0.5, logit_bias={1: 10.0})

    assert values == [0.5, 5.5, 1.0]


def test_logit_bias_is_added_and_unknown_tokens_are_left_out() -> None:
    assert changed([0.0, 1.0, 2.0], logit_bias={0: 5.0, 2: -100.0, 99: 3.0}) == [5.0, 1.0, -98.0]


def test_end_and_stop_tokens_are_masked_before_the_minimum_length() -> None:
    row = {"eos": (3, 999), "min_tokens": 2, "stop_token_ids": (2,)}

    assert greedy([0.0, 1.0, 2.0, 3.0], num_output=1, **row) == 1
    assert greedy([0.0, 1.0, 2.0, 3.0], num_output=2, **row) == 3


def test_end_tokens_but_not_stop_tokens_are_masked_when_they_are_ignored() -> None:
    row = {"eos": (3,), "ignore_eos": True, "stop_token_ids": (2,)}

    assert greedy([0.0, 1.0, 2.0, 3.0], num_output=100, **row) == 2
    assert set(draw([0.1, 0.1, 0.1, 0.7], ignore_eos=True)) == {0, 1, 2, 3}  # no end tokens known


def bit_words(allowed: list[bool]) -> np.ndarray:
    """As a grammar gives them, with ones beyond the vocabulary."""
    return np.packbits([*allowed, *[True] * (-len(allowed) % 32)], bitorder="little").view(np.int32)


def test_a_mask_leaves_only_allowed_tokens() -> None:
    masks = [bit_words([True, False, True]), None, bit_words([False, False, True])]
    rows = [replace(make_row(temperature=temperature), mask=mask) for temperature, mask in zip((0.0, 0.0, 1.0), masks, strict=True)]

    tokens = sample(torch.tensor([[1.0, 9.0, 2.0]] * 3), rows, eos_token_ids=())

    assert [token.token_id for token in tokens] == [2, 1, 2]


@given(allowed=st.lists(st.booleans(), min_size=1, max_size=200).filter(any), seed=st.integers(0, 99))
def test_a_masked_row_draws_as_if_the_other_tokens_had_no_weight(allowed: list[bool], seed: int) -> None:
    logits = torch.randn(1, len(allowed), generator=torch.Generator().manual_seed(seed))
    without = torch.where(torch.tensor([allowed]), logits, -torch.inf)
    row = make_row(seed=seed)

    [token] = sample(logits.clone(), [replace(row, mask=bit_words(allowed))], eos_token_ids=())

    assert token == sample(without, [row], eos_token_ids=())[0]
    assert allowed[token.token_id]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 2}, {"min_p": 0.5}])
def test_a_row_with_nothing_left_ends(params: dict[str, Any]) -> None:
    row = replace(make_row(**params), mask=bit_words([False] * 5))

    assert sample(torch.randn(1, 5), [row], eos_token_ids=(3,))[0].token_id == 3
    assert sample(torch.randn(1, 5), [row], eos_token_ids=())[0].token_id == 0


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 2}, {"min_p": 0.5}])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_broken_logits_still_give_a_token(params: dict[str, Any], broken: float) -> None:
    logits = torch.full((2, 300), broken)
    logits[1, :5] = 1.0

    for token in sample(logits, [make_row(**params)] * 2, eos_token_ids=()):
        assert 0 <= token.token_id < 300


# Log-probabilities


def test_logprobs_are_the_models_own_whatever_the_sampling_does() -> None:
    row = make_row(temperature=0.0, logit_bias={3: 50.0}, logprobs=2)

    token = sample(log(PROBABILITIES), [row], eos_token_ids=())[0]

    assert token.token_id == 3
    assert token.logprobs is not None
    assert token.logprobs.token_id == 3
    assert token.logprobs.logprob == pytest.approx(math.log(0.11), abs=1e-6)
    assert token.logprobs.rank == 4
    assert [token_id for token_id, _ in token.logprobs.top] == [0, 1]
    assert [logprob for _, logprob in token.logprobs.top] == pytest.approx([math.log(0.23), math.log(0.20)], abs=1e-6)


def test_only_rows_that_ask_get_logprobs_and_each_as_many_as_it_asks() -> None:
    rows = [make_row(temperature=0.0, logprobs=count) for count in (None, 0, 3, 20)]

    tokens = sample(log(PROBABILITIES).repeat(4, 1), rows, eos_token_ids=())

    assert [None if token.logprobs is None else len(token.logprobs.top) for token in tokens] == [None, 0, 3, 9]


def test_top_logprobs_of_equals_name_the_smaller_token_ids_and_rank_them_alike() -> None:
    token = sample(torch.zeros(1, 500), [make_row(temperature=0.0, logprobs=3)], eos_token_ids=())[0]

    assert token.logprobs is not None
    assert token.logprobs.rank == 1
    assert token.logprobs.top[0][0] == token.token_id == 0


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, 10), [], eos_token_ids=()) == []
