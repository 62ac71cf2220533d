"""Beam search equals the reference's, alone and beside others, cached, preempted or cut up; sampled beams follow its distribution."""

import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.beams import BeamSearch, Continuation
from engine.config import EngineConfig
from engine.continuations import continuations
from engine.core import Engine
from engine.request import FinishReason, InvalidRequestError, Prompt, Request, RequestFailure, SamplingParams, make_cache_keys
from engine.sampler import SamplingRow
from tests.tiny_models import write_tiny

EOS = 2  # of the tiny tokenizer: <|im_end|>
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def engine(folder) -> Iterator[Engine]:
    engine = make_engine(folder)
    yield engine
    engine.scheduler.check()
    assert engine.stats().num_referenced_blocks == 0
    engine.close()


def make_engine(folder, **settings: Any) -> Engine:
    config = EngineConfig(model_folder=str(folder), device="cpu", **{"session_len": 256, "max_batch_size": 16, **settings})
    return Engine(config.resolve(json.loads((folder / "config.json").read_text())))


def prompt_of(seed: int, num_tokens: int = 40, *, tenant: str = "") -> Prompt:
    token_ids = tuple(torch.randint(3, 400, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist())
    return Prompt(token_ids=token_ids, cache_keys=make_cache_keys(token_ids, (), ()), tenant=tenant)


def run(engine: Engine) -> dict[str, list]:
    outputs: dict[str, list] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.scheduler.check()
    return outputs


def tokens(outputs: list) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def greedy_beams(num_beams: int, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"num_beams": num_beams, "temperature": 0.0, "max_tokens": NUM_TOKENS, **fields})


def reference(model, prompt: Prompt, num_beams: int, eos: list[int], **options: Any) -> list[int]:
    with torch.inference_mode():
        ids = model.generate(
            torch.tensor([prompt.token_ids]),
            attention_mask=torch.ones(1, len(prompt.token_ids), dtype=torch.int64),
            num_beams=num_beams,
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            eos_token_id=eos,
            pad_token_id=0,
            **options,
        )[0, len(prompt.token_ids) :].tolist()
    return ids[: next((place + 1 for place, token_id in enumerate(ids) if token_id in eos), len(ids))]


def test_the_tokens_of_the_answer_are_counted_not_those_of_all_beams(engine) -> None:
    engine.add("beams", prompt_of(1), greedy_beams(4, max_tokens=10, ignore_eos=True))

    outputs = run(engine)["beams"]

    assert engine.stats().num_output_tokens == len(tokens(outputs)) == 10


# Tokens that the tiny model likes: as stop tokens, they make beams end at different lengths.
def likely_ends(model, prompt: Prompt) -> list[int]:
    free = reference(model, prompt, 4, [EOS])
    return sorted({free[5], free[9]} - {EOS})


@pytest.mark.parametrize("num_beams", [2, 3, 4])
@pytest.mark.parametrize("settings", [{}, {"max_prefill_token_num": 9}, {"enable_prefix_caching": False}, {"tp": 2}], ids=str)
def test_beams_equal_the_reference_alone_and_all_at_once(folder, model, num_beams, settings):
    engine = make_engine(folder, **settings)
    prompts = [prompt_of(seed) for seed in range(3)]
    stops = [likely_ends(model, prompt) for prompt in prompts]
    expected = [reference(model, prompt, num_beams, [EOS, *ends]) for prompt, ends in zip(prompts, stops, strict=True)]
    engine.add("greedy", prompts[0], SamplingParams(temperature=0, max_tokens=NUM_TOKENS))
    [alone] = run(engine).values()

    for number, (prompt, ends) in enumerate(zip(prompts, stops, strict=True)):
        engine.add(f"alone {number}", prompt, greedy_beams(num_beams, stop_token_ids=tuple(ends)))
        assert tokens(run(engine)[f"alone {number}"]) == expected[number]
    for number, (prompt, ends) in enumerate(zip(prompts, stops, strict=True)):
        engine.add(f"together {number}", prompt, greedy_beams(num_beams, stop_token_ids=tuple(ends)))
    engine.add("greedy", prompts[0], SamplingParams(temperature=0, max_tokens=NUM_TOKENS))
    outputs = run(engine)

    assert [tokens(outputs[f"together {number}"]) for number in range(3)] == expected
    assert tokens(outputs["greedy"]) == tokens(alone)
    assert any(len(answer) < NUM_TOKENS for answer in expected), "no search ended early: the stop tokens are badly chosen"
    for number, answer in enumerate(expected):
        ends = answer[-1] in (EOS, *stops[number])
        assert outputs[f"together {number}"][-1].finish_reason is (FinishReason.STOP if ends else FinishReason.LENGTH)
    assert engine.stats().num_referenced_blocks == 0
    engine.close()


def test_preempted_beams_equal_the_reference(folder, model):
    """Blocks for one search and a half, beside a long answer."""
    engine = make_engine(folder, cache_max_entry_count=20, cache_block_seq_len=16, session_len=160)
    prompts = [prompt_of(seed) for seed in range(3)]
    engine.add("long", prompt_of(9, 60), SamplingParams(temperature=0, max_tokens=90, ignore_eos=True))
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, greedy_beams(3))

    outputs = run(engine)

    assert engine.scheduler.num_preemptions > 0
    assert [tokens(outputs[str(number)]) for number in range(3)] == [reference(model, prompt, 3, [EOS]) for prompt in prompts]
    engine.close()


def test_a_repetition_penalty_works_on_log_probabilities_as_the_references_does(engine, model):
    engine.add("request", prompt_of(1), greedy_beams(3, repetition_penalty=1.3))
    for _ in range(4):
        engine.step()

    read = {id(beam.distinct_prompt_ids) for beam in engine.scheduler.requests.values()}
    assert len(read) == 1, "each beam has found the prompt's tokens for itself"
    assert tokens(run(engine)["request"]) == reference(model, prompt_of(1), 3, [EOS], repetition_penalty=1.3)


def test_the_window_ends_a_search_as_its_length_does(folder):
    engine = make_engine(folder)
    engine.add("request", prompt_of(1, 250), SamplingParams(num_beams=2, temperature=0))

    outputs = run(engine)["request"]

    assert outputs[-1].finish_reason is FinishReason.LENGTH or tokens(outputs)[-1] == EOS
    assert len(tokens(outputs)) <= 6
    engine.close()


def test_a_search_takes_no_more_rows_than_there_are(folder):
    engine = make_engine(folder, max_batch_size=4)
    for number in range(3):
        engine.add(str(number), prompt_of(number), greedy_beams(3))
        engine.add(f"free {number}", prompt_of(10 + number), SamplingParams(temperature=0, max_tokens=8))

    outputs = run(engine)  # checks the number of running rows after each step

    assert len(outputs) == 6
    engine.close()


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 6])
def test_a_search_goes_on_as_it_was_where_memory_runs_out_while_its_blocks_are_copied(folder, monkeypatch, num_steps):
    """The copies are of forks, which the scheduler made once. What lies in the blocks that they went to would be others' otherwise."""
    engine = make_engine(folder, cache_block_seq_len=16)
    with torch.inference_mode():
        for cache in engine.runner.attention.caches:
            cache.keys.normal_(std=50)
            cache.values.normal_(std=50)
    params = greedy_beams(4, ignore_eos=True)
    engine.add("alone", prompt_of(1, 20), params)
    expected = tokens(run(engine)["alone"])
    copy_blocks, failures = engine.runner.attention.copy_blocks, [torch.OutOfMemoryError()]

    def short_of_memory(copies):
        if failures and copies and "large" in engine.scheduler.requests:
            raise failures.pop()
        copy_blocks(copies)

    monkeypatch.setattr(engine.runner.attention, "copy_blocks", short_of_memory)
    engine.add("beams", prompt_of(1, 20), params)
    for _ in range(num_steps):
        engine.step()
    engine.add("large", prompt_of(2, 100), greedy_beams(1))
    outputs = run(engine)

    assert not failures
    assert outputs["large"][-1].finish_reason is FinishReason.ERROR
    assert tokens(outputs["beams"]) == expected
    engine.close()


def test_an_abort_or_a_failure_ends_all_beams(engine):
    engine.add("aborted", prompt_of(1), greedy_beams(4))
    engine.add("failed", prompt_of(2), greedy_beams(4))
    for _ in range(4):
        engine.step()

    assert engine.abort("aborted").finish_reason is FinishReason.ABORT
    assert engine.abort("aborted") is None
    beam = next(beam_id for beam_id in engine.scheduler.requests if beam_id.startswith("failed/"))
    assert engine._fail(beam, RequestFailure("no reason")).request_id == "failed"
    assert not engine.has_work


def test_an_abort_ends_a_search_that_has_dropped_its_first_beam(engine):
    engine.add("aborted", prompt_of(1), greedy_beams(4))
    while "aborted" in engine.scheduler.requests:
        engine.step()
    assert engine.has_work
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.add("aborted", prompt_of(2), SamplingParams())

    assert engine.abort("aborted").finish_reason is FinishReason.ABORT

    assert not engine.has_work


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(num_beams=17), "only up to 16"),
        (SamplingParams(num_beams=2, logprobs=1), "logprobs"),
        (SamplingParams(num_beams=2, max_tokens=0), "no token"),
        (SamplingParams(num_beams=16), "blocks"),
    ],
)
def test_a_search_that_could_never_run_is_refused(folder, params, message):
    engine = make_engine(folder, cache_max_entry_count=40)
    with pytest.raises(InvalidRequestError, match=message):
        engine.add("request", prompt_of(1), params)
    assert not engine.has_work
    engine.close()


def test_sampled_beams_depend_on_their_seed_alone(engine):
    def answer(seed: int) -> list[int]:
        engine.add("request", prompt_of(1), SamplingParams(num_beams=3, temperature=1.5, top_k=40, seed=seed, max_tokens=NUM_TOKENS))
        return tokens(run(engine)["request"])

    answers = [answer(seed) for seed in (1, 2, 3, 1)]

    assert answers[0] == answers[3]
    assert len({tuple(answer) for answer in answers}) > 1


def test_continuations_are_drawn_without_replacement_by_weight():
    """Pairs of four tokens: the probability of (i, j) is p_i p_j / (1 - p_i)."""
    probabilities = (0.5, 0.25, 0.15, 0.1)
    num_draws = 20_000
    counts: Counter[tuple[int, int]] = Counter()
    logits = torch.tensor(probabilities).log()
    for step in range(num_draws):
        row = SamplingRow(SamplingParams(num_beams=2), (), {}, step, 5)
        first, second = continuations(logits, row, eos_token_ids=(), num_kept=2, min_kept=2)
        counts[first.token_id, second.token_id] += 1

    for (i, j), count in counts.items():
        expected = probabilities[i] * probabilities[j] / (1 - probabilities[i])
        assert abs(count / num_draws - expected) < 4.5 * math.sqrt(expected / num_draws)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [({"top_k": 1}, 2), ({"top_k": 3}, 3), ({"top_p": 0.6}, 2), ({"top_p": 0.8}, 3), ({"min_p": 0.4}, 2), ({"min_p": 0.9}, 2), ({}, 4)],
)
def test_dropped_tokens_are_no_continuations_but_two_stay(fields, kept):
    row = SamplingRow(SamplingParams(num_beams=2, **fields), (), {}, 0, 5)

    found = continuations(torch.tensor((0.5, 0.25, 0.15, 0.1)).log(), row, eos_token_ids=(), num_kept=8, min_kept=2)

    assert sorted(offer.token_id for offer in found) == list(range(kept))


def test_nothing_is_sorted_where_nothing_is_dropped(monkeypatch):
    """A vocabulary takes milliseconds to sort, for each beam of each step."""
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(1))

    def drawn(**fields: Any) -> list[Continuation]:
        row = SamplingRow(SamplingParams(num_beams=2, temperature=0.7, **fields), (), {}, 0, 5)
        return continuations(logits, row, eos_token_ids=(), num_kept=8, min_kept=2)

    expected = drawn(top_k=1999)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "sort", None)
        assert drawn() == expected


@pytest.mark.parametrize("seed", range(20))
def test_candidates_are_the_best_of_all_offers_and_no_others_are_made(monkeypatch, seed):
    """Against all of them written out, scored and sorted; equal sums stay in the order of beams and offers."""
    draw = random.Random(seed)
    num_beams, ends = draw.randint(2, 5), frozenset(draw.sample(range(30), draw.randint(0, 3)))
    search = BeamSearch(Request("request", prompt_of(seed), greedy_beams(num_beams)), num_beams, ends, draw.choice((5, 9)))
    search.scores = {str(beam): -draw.randint(0, 4) / 2 for beam in range(num_beams)}
    noise = draw.choice((0, 3))
    search.offers = {
        beam: [Continuation(token_id, -draw.randint(0, 9) / 2, draw.randint(0, noise) / 2) for token_id in draw.sample(range(30), 30)]
        for beam in search.scores
    }
    plain = [
        (score + offer.logprob + offer.noise, beam, offer.token_id, score + offer.logprob, offer.token_id in ends or search.max_tokens == 5)
        for beam, score in search.scores.items()
        for offer in search.offers[beam]
    ]
    made = []
    monkeypatch.setattr("engine.beams._Candidate", lambda *parts: made.append(parts) or parts)

    found = search.candidates(4)

    assert found == [entry[1:] for entry in sorted(plain, key=lambda entry: -entry[0])][: search.num_kept]
    assert made == found


def test_a_keys_searches_leave_a_quarter_of_the_rows_to_others(folder):
    engine = make_engine(folder, max_batch_size=8)
    for number in range(4):
        engine.add(f"search {number}", prompt_of(number, tenant="a"), greedy_beams(2, ignore_eos=True))
    for number in range(4):
        engine.add(f"free {number}", prompt_of(10 + number, tenant="a"), SamplingParams(temperature=0, max_tokens=NUM_TOKENS))
    for _ in range(4):
        engine.step()
    assert engine.scheduler.num_running == 8

    engine.add("other", prompt_of(20, tenant="b"), SamplingParams(temperature=0, max_tokens=NUM_TOKENS))
    first = engine.step()

    assert "other" in [output.request_id for output in first]
    assert len(run(engine)) == 9
    engine.close()


def test_a_search_of_the_whole_batch_runs_where_its_keys_other_searches_have_ended(folder, model):
    engine = make_engine(folder, max_batch_size=4)
    engine.add("small", prompt_of(0, tenant="a"), greedy_beams(2))
    engine.add("whole", prompt_of(1, tenant="a"), greedy_beams(4))
    engine.add("other", prompt_of(2, tenant="b"), greedy_beams(2))

    outputs = run(engine)

    assert tokens(outputs["whole"]) == reference(model, prompt_of(1), 4, [EOS])
    assert tokens(outputs["small"]) == reference(model, prompt_of(0), 2, [EOS])
    assert tokens(outputs["other"]) == reference(model, prompt_of(2), 2, [EOS])
    engine.close()
