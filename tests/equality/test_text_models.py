"""Tiny random text checkpoints, each decoded by the engine as by the reference."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.models.decoder import Decoder
from engine.models.fallback import FallbackDecoder
from engine.models.registry import eos_token_ids, load_config
from engine.request import Prompt, make_cache_keys
from tests.equality.harness import Answer, RecordingEngine, assert_equal, reference_answer
from tests.tiny_models import write_tiny

FAST = ("llama", "qwen2", "qwen3", "mistral", "internlm", "internlm2")
FALLBACK = ("gemma3_text", "gpt_neox")
NUM_NEW_TOKENS = 64


@pytest.fixture(scope="module", params=FAST + FALLBACK)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def prompts(folder: Path, num_prompts: int) -> list[Prompt]:
    return [random_prompt(folder, seed) for seed in range(num_prompts)]


@pytest.fixture(scope="module")
def references(folder: Path, prompts: list[Prompt]) -> list[Answer]:
    return reference_answers(folder, prompts)


def test_a_batch_of_prompts_in_small_chunks_gives_the_references_tokens(folder, prompts, references):
    with RecordingEngine(folder, max_prefill_token_num=16, max_batch_size=5) as engine:
        answers = engine.answers(prompts, num_new_tokens=NUM_NEW_TOKENS)

    assert_equal(answers, references)
    assert max(len(plan.chunks) for plan in engine.plans) == 5


def test_each_prompt_alone_gives_the_references_tokens(folder, prompts, references):
    with RecordingEngine(folder) as engine:
        answers = engine.answers(prompts[:4], num_new_tokens=NUM_NEW_TOKENS, together=False)

    assert_equal(answers, references[:4])


def test_each_checkpoint_runs_on_the_decoder_meant_for_it(folder):
    with RecordingEngine(folder) as engine:
        expected = Decoder if folder.name.startswith(FAST) else FallbackDecoder  # the fixture's folder starts with the model's name
        assert type(engine.engine.runner.decoder) is expected


@pytest.mark.parametrize("name", FAST)
def test_a_shifted_position_is_noticed(name, tmp_path):
    folder = write_tiny(name, tmp_path)
    prompts = [random_prompt(folder, seed) for seed in (1, 2)]
    shifted = [with_position_delta(prompt, 3) for prompt in prompts]

    with RecordingEngine(folder) as engine:
        answers = engine.answers(shifted, num_new_tokens=4)

    with pytest.raises(AssertionError, match="logits differ"):
        assert_equal(answers, [cut(answer, 4) for answer in reference_answers(folder, prompts)])


@pytest.mark.parametrize(
    ("name", "tp"),
    [("llama", 2), ("llama", 4), *(pytest.param(name, tp, marks=pytest.mark.full) for name in FAST[1:] for tp in (2, 4))],
)
def test_tensor_parallel_ranks_give_the_references_tokens(name, tp, tmp_path, num_prompts):
    folder = write_tiny(name, tmp_path)
    prompts = [random_prompt(folder, seed) for seed in range(num_prompts)]

    with RecordingEngine(folder, tp=tp, max_prefill_token_num=32) as engine:
        answers = engine.answers(prompts, num_new_tokens=NUM_NEW_TOKENS)

    assert_equal(answers, reference_answers(folder, prompts))


def random_prompt(folder: Path, seed: int) -> Prompt:
    rng = random.Random(f"{folder.name}-{seed}")
    token_ids = tuple(rng.randrange(3, load_config(str(folder)).vocab_size) for _ in range(rng.randrange(2, 80)))
    return Prompt(token_ids=token_ids, cache_keys=make_cache_keys(token_ids, (), ()))


def with_position_delta(prompt: Prompt, delta: int) -> Prompt:
    """The same tokens, the second half of them `delta` positions later."""
    half = len(prompt.token_ids) // 2
    axis = tuple(slot + (delta if slot >= half else 0) for slot in range(len(prompt.token_ids)))
    return Prompt(token_ids=prompt.token_ids, cache_keys=prompt.cache_keys, positions=(axis,) * 3, position_delta=delta)


def cut(answer: Answer, num_tokens: int) -> Answer:
    return Answer(answer.token_ids[:num_tokens], answer.logits[:num_tokens])


def reference_answers(folder: Path, prompts: list[Prompt]) -> list[Answer]:
    model = reference_model(folder)
    end_ids = eos_token_ids(load_config(str(folder)), json.loads((folder / "generation_config.json").read_text()))
    inputs = [{"input_ids": torch.tensor([prompt.token_ids])} for prompt in prompts]
    return [reference_answer(model, each, num_new_tokens=NUM_NEW_TOKENS, eos_token_ids=end_ids) for each in inputs]


def reference_model(folder: Path) -> PreTrainedModel:
    """InternLM2 is unknown to the reference without remote code: the Llama that it was repacked from lies beside it."""
    as_llama = folder / "as_llama"
    return AutoModelForCausalLM.from_pretrained(as_llama if as_llama.is_dir() else folder, dtype=torch.float32).eval()
