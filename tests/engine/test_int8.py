"""Weights in int8: off by half a scale at most, in all ways of computing the same, and in a quarter of the memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.core import Engine
from engine.layers.int8 import Int8Weight
from engine.layers.packed import pack_linears
from engine.request import Prompt, SamplingParams, make_cache_keys
from tests.tiny_models import write_tiny

PROMPT = tuple(range(10, 60))


@given(seed=st.integers(0, 1000), rows=st.integers(1, 9), columns=st.integers(1, 9), magnitude=st.sampled_from((0.0, 1e-6, 1.0, 1e4)))
def test_a_weight_is_off_by_half_a_scale_at_most(seed: int, rows: int, columns: int, magnitude: float) -> None:
    weight = magnitude * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))

    stored = Int8Weight(weight)

    written_out = stored.values * stored.scales
    assert ((written_out - weight).abs() <= stored.scales * 0.5001).all()
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(stored.product(x, None), x @ written_out.T)


def prompt_logprobs(folder: Path, **settings: Any) -> tuple[torch.Tensor, Engine]:
    config = EngineConfig(model_folder=str(folder), device="cpu", session_len=256, max_batch_size=4, **settings)
    engine = Engine(config.resolve(json.loads((folder / "config.json").read_text())))
    prompt = Prompt(token_ids=PROMPT, cache_keys=make_cache_keys(PROMPT, (), ()))
    engine.add("request", prompt, SamplingParams(max_tokens=0, prompt_logprobs=0))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    engine.close()
    return torch.tensor([scored.logprob for scored in outputs[0].prompt_logprobs]), engine


def rounded_reference(folder: Path) -> torch.Tensor:
    """The log-probabilities of the reference whose linear layers but the head were rounded to int8 and back."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in ("lm_head", "embed_out"):
            stored = Int8Weight(module.weight)
            module.weight.data = stored.values * stored.scales
    with torch.inference_mode():
        logprobs = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    return logprobs[range(len(PROMPT) - 1), PROMPT[1:]]


WAYS = [("llama", {}), ("llama", {"max_prefill_token_num": 7}), ("llama", {"tp": 2}), ("gpt_neox", {})]


@pytest.mark.parametrize(("name", "settings"), WAYS, ids=str)
def test_the_engine_computes_what_the_rounded_reference_does(tmp_path, name, settings):
    folder = write_tiny(name, tmp_path / name)

    logprobs, _ = prompt_logprobs(folder, load_in_8bit=True, **settings)

    torch.testing.assert_close(logprobs, rounded_reference(folder), atol=1e-4, rtol=0)
    assert not torch.allclose(logprobs, prompt_logprobs(folder)[0], atol=1e-4), "nothing was rounded"


def test_only_int8_stays_in_memory(tmp_path):
    _, engine = prompt_logprobs(write_tiny("llama", tmp_path / "llama"), load_in_8bit=True)

    layer = engine.runner.decoder.layers[0]
    kept = {name: tensor.dtype for name, tensor in layer.state_dict().items() if tensor.dim() == 2 and tensor.shape[1] > 1}
    assert kept
    assert set(kept.values()) == {torch.int8}


def test_a_head_and_what_looks_at_pictures_stay_as_they_are():
    model = nn.ModuleDict({"lm_head": nn.Linear(2, 2), "vision_tower": nn.Sequential(nn.Linear(2, 2)), "mlp": nn.Linear(2, 2)})

    pack_linears(model, in_8bit=True)

    assert isinstance(model["mlp"].weight, Int8Weight)
    assert not isinstance(model["lm_head"].weight, Int8Weight)
    assert not isinstance(model["vision_tower"][0].weight, Int8Weight)
