"""Longer windows by a larger rotary base: the factor for a window, the frequencies, and equality with the reference library."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from engine.config import EngineConfig, alpha_for, window_for
from engine.core import Engine
from engine.layers.rotary import RotaryEmbedding, stretch
from engine.models.registry import load_config
from engine.request import Prompt, SamplingParams, make_cache_keys
from tests.tiny_models import write_tiny

TRAINED = 2048
PROMPT = tuple(range(10, 60))
NUM_NEW_TOKENS = 12


def resolved(**fields: Any) -> EngineConfig:
    return EngineConfig(model_folder="", **fields).resolve({"max_position_embeddings": TRAINED})


@pytest.mark.parametrize(("session_len", "alpha"), [(100, 1), (2048, 1), (4096, 1.1 * 3), (8192, 1.1 * 7)])
def test_the_factor_for_a_window_is_the_projects(session_len: int, alpha: float) -> None:
    assert alpha_for(session_len, TRAINED) == pytest.approx(alpha)
    assert resolved(alpha="auto", session_len=session_len).alpha == pytest.approx(alpha)


@given(st.integers(64, 1 << 17), st.integers(0, 1 << 20))
def test_a_factors_window_is_the_one_that_it_was_chosen_for(trained_len: int, more: int) -> None:
    window = trained_len + more

    assert window_for(alpha_for(window, trained_len), trained_len) == window


@pytest.mark.parametrize(
    ("fields", "session_len"),
    [
        ({"session_len": 9000}, 2048),
        ({"session_len": 9000, "alpha": 1}, 2048),
        ({"session_len": 9000, "alpha": 2.0}, 9000),
        ({"session_len": 100, "alpha": 2.0}, 100),
        ({"alpha": 3.3}, 4096),
        ({"alpha": 1.05}, 2048),
        ({"alpha": "auto"}, 2048),
        ({"alpha": "auto", "session_len": 9000}, 9000),
    ],
)
def test_the_window_is_longer_than_the_checkpoints_only_with_a_factor(fields: dict[str, Any], session_len: int) -> None:
    once = resolved(**fields)

    assert once.session_len == session_len
    assert once.resolve({"max_position_embeddings": TRAINED}) == once


def test_the_frequencies_are_those_of_the_scaled_base(tmp_path: Path) -> None:
    config = load_config(str(write_tiny("llama", tmp_path)))
    dim, base = config.head_dim, config.rope_parameters["rope_theta"]

    stretch(config, 4.0)
    found = RotaryEmbedding(config, head_dim=dim, device=torch.device("cpu")).inv_freq

    scaled = base * 4.0 ** (dim / (dim - 2))
    torch.testing.assert_close(found, torch.tensor([1 / scaled ** (2 * i / dim) for i in range(dim // 2)]))
    assert found[0] == 1  # the fastest stays,
    assert found[-1] * 4 == pytest.approx(base ** -((dim - 2) / dim))  # the slowest turns at a fourth


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_answers_are_those_of_the_reference_with_the_same_base(name: str, tmp_path: Path) -> None:
    folder = write_tiny(name, tmp_path)
    config = AutoConfig.from_pretrained(folder)
    plain = reference(folder, config)
    dim = config.hidden_size // config.num_attention_heads
    config.rope_parameters["rope_theta"] *= 8.0 ** (dim / (dim - 2))

    tokens, logprobs = answer(folder, alpha=8.0)

    expected_tokens, expected_logprobs = reference(folder, config)
    assert tokens == expected_tokens
    torch.testing.assert_close(torch.tensor(logprobs), expected_logprobs, atol=1e-4, rtol=1e-4)
    assert (expected_logprobs - plain[1]).abs().max() > 1e-2  # the base is of consequence


def test_a_model_whose_own_modules_run_is_scaled_too(tmp_path: Path) -> None:
    folder = write_tiny("gpt_neox", tmp_path)
    config = AutoConfig.from_pretrained(folder)
    dim = int(config.hidden_size // config.num_attention_heads * config.rope_parameters["partial_rotary_factor"])
    config.rope_parameters["rope_theta"] *= 8.0 ** (dim / (dim - 2))

    _, logprobs = answer(folder, alpha=8.0)

    torch.testing.assert_close(torch.tensor(logprobs), reference(folder, config)[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("parameters", [None, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}])
def test_a_model_without_a_plain_base_is_refused(tmp_path: Path, parameters: Any) -> None:
    config = load_config(str(write_tiny("llama", tmp_path)))
    config.rope_parameters = parameters

    with pytest.raises(ValueError, match=r"--alpha: only 1 is allowed: llama has no plain rotary positions"):
        stretch(config, 2.0)


def answer(folder: Path, **settings: Any) -> tuple[list[int], list[float]]:
    """Greedy tokens and the prompt's log-probabilities."""
    config = EngineConfig(model_folder=str(folder), device="cpu", session_len=256, max_batch_size=4, **settings)
    engine = Engine(config.resolve(json.loads((folder / "config.json").read_text())))
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW_TOKENS, prompt_logprobs=0, ignore_eos=True)
    engine.add("request", Prompt(token_ids=PROMPT, cache_keys=make_cache_keys(PROMPT, (), ())), params)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    engine.close()
    scored = [token.logprob for output in outputs for token in output.prompt_logprobs or ()]
    assert all(map(math.isfinite, scored))
    return [token for output in outputs for token in output.token_ids], scored


def reference(folder: Path, config: Any) -> tuple[list[int], torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    with torch.inference_mode():
        model.generation_config.eos_token_id = None
        ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=NUM_NEW_TOKENS, do_sample=False, pad_token_id=0)[0, len(PROMPT) :]
        logprobs = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    return ids.tolist(), logprobs[range(len(PROMPT) - 1), PROMPT[1:]]
