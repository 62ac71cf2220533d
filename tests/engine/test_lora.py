"""A merged adapter gives the logits of the model whose weights were changed by hand, in our decoder, split or not, and the reference's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.core import Engine
from engine.models.lora import Lora
from engine.models.registry import UnsupportedModelError
from engine.request import Prompt, SamplingParams, make_cache_keys
from tests.tiny_models import write_tiny

RANK, ALPHA = 4, 6
TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj", "attention.dense")
PROMPT = tuple(range(10, 60))
NUM_NEW_TOKENS = 12


def changed_model(folder: Path, *, vocab_size: int | None, scale: float) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model with an adapter's change made by hand, and the adapter's tensors under PEFT's names."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        if module.endswith(TARGETS):
            out_features, in_features = parameter.shape
            down, up = (torch.randn(shape, generator=generator) * 0.2 for shape in ((RANK, in_features), (out_features, RANK)))
            tensors |= {f"base_model.model.{module}.lora_A.weight": down, f"base_model.model.{module}.lora_B.weight": up}
            parameter.data += scale * up @ down
    if vocab_size is not None:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
        for name, parameter in (("model.embed_tokens", model.get_input_embeddings()), ("lm_head", model.get_output_embeddings())):
            parameter.weight.data = torch.randn(parameter.weight.shape, generator=generator) * 0.3
            tensors[f"base_model.model.{name}.weight"] = parameter.weight.data.clone()
    return model, tensors


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], *, as_bin: bool = False, **fields: Any) -> Path:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if as_bin:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def answer(folder: Path, lora: Path, **settings: Any) -> tuple[list[int], list[float]]:
    """Greedy tokens and the prompt's log-probabilities."""
    config = EngineConfig(model_folder=str(folder), lora_folder=str(lora), device="cpu", session_len=256, max_batch_size=4, **settings)
    engine = Engine(config.resolve(json.loads((folder / "config.json").read_text())))
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW_TOKENS, prompt_logprobs=0, ignore_eos=True)
    engine.add("request", Prompt(token_ids=PROMPT, cache_keys=make_cache_keys(PROMPT, (), ())), params)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    engine.close()
    return [token for output in outputs for token in output.token_ids], [scored.logprob for scored in outputs[0].prompt_logprobs]


def reference(model: Any) -> tuple[list[int], torch.Tensor]:
    with torch.inference_mode():
        model.generation_config.eos_token_id = None
        ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=NUM_NEW_TOKENS, do_sample=False, pad_token_id=0)[0, len(PROMPT) :]
        logprobs = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    return ids.tolist(), logprobs[range(len(PROMPT) - 1), PROMPT[1:]]


@pytest.mark.parametrize(
    ("fields", "scale"),
    [({}, ALPHA / RANK), ({"use_rslora": True}, ALPHA / RANK**0.5), ({"alpha_pattern": {".*": 2}}, 2 / RANK)],
    ids=["plain", "rank-stabilised", "pattern"],
)
@pytest.mark.parametrize(("name", "tp", "vocab_size"), [("llama", 1, None), ("llama", 2, 411), ("llama", 1, 411), ("gpt_neox", 1, None)])
def test_the_merged_model_is_the_changed_one(tmp_path, name, tp, vocab_size, fields, scale):
    folder = write_tiny(name, tmp_path / "base")
    model, tensors = changed_model(folder, vocab_size=vocab_size, scale=scale)
    lora = write_adapter(tmp_path / "lora", tensors, as_bin=tp == 2, **fields)

    token_ids, logprobs = answer(folder, lora, tp=tp)

    expected_ids, expected = reference(model)
    torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)
    assert token_ids == expected_ids


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        ({"base_model.model.model.layers.0.mlp.nothing.lora_A.weight": torch.ones(4, 64)}, {}, "only one of its two"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 64)}, {}, "kind of adapter"),
        ({}, {"peft_type": "IA3"}, "IA3"),
        ({}, {"use_dora": True}, "DoRA"),
    ],
)
def test_what_cannot_be_merged_is_refused(tmp_path, tensors, fields, message):
    with pytest.raises(UnsupportedModelError, match=message):
        Lora(str(write_adapter(tmp_path / "lora", tensors, **fields)))


def test_an_adapter_for_another_model_is_refused(tmp_path):
    folder = write_tiny("llama", tmp_path / "base")
    tensors = {f"base_model.model.model.layers.7.mlp.up_proj.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}

    with pytest.raises(UnsupportedModelError, match=r"does not have.*layers\.7\.mlp\.up_proj"):
        answer(folder, write_adapter(tmp_path / "lora", tensors))


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"adapter_config\.json"):
        Lora(str(tmp_path))
