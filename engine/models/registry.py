"""Which decoder runs a checkpoint: one row per Llama-shaped model type gives the fast decoder's spec; every other type falls back.

Also reads configs that `transformers` does not know without remote code (InternLM2).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from engine.models.decoder import DecoderSpec

GGUF_SUFFIX = ".gguf"


class UnsupportedModelError(ValueError):
    """The checkpoint cannot be served; the message says what can."""


def load_config(model_folder: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The checkpoint's config; a GGUF file carries its own."""
    path = Path(model_folder)
    if path.suffix == GGUF_SUFFIX:
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    raw = json.loads((path / "config.json").read_text())
    if raw.get("model_type") in _LLAMAS_BY_ANOTHER_NAME:
        return _llama_config(raw)
    return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def fast_spec(config: PretrainedConfig) -> DecoderSpec | None:
    """The fast decoder's spec for a text or image-text config; None where only the fallback runs it."""
    text = config.get_text_config()
    differences = _FAST.get(text.model_type)
    if differences is None or text.hidden_act != "silu":
        return None
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return DecoderSpec(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=text.vocab_size,
        norm_eps=text.rms_norm_eps,
        ties_embeddings=bool(config.tie_word_embeddings),
        **differences(text),
    )


def eos_token_ids(config: PretrainedConfig, generation: dict[str, Any]) -> tuple[int, ...]:
    """The generation config's end tokens, else the model config's."""
    stated = generation.get("eos_token_id")
    if stated is None:
        stated = getattr(config.get_text_config(), "eos_token_id", None)
    if stated is None:
        stated = getattr(config, "eos_token_id", None)
    if stated is None:
        return ()
    return tuple(stated) if isinstance(stated, list) else (stated,)


_LLAMAS_BY_ANOTHER_NAME = ("internlm", "internlm2")  # whose own classes are remote code


def _llama_config(raw: dict[str, Any]) -> LlamaConfig:
    """InternLM is a Llama whose attention has biases; InternLM2 and 2.5 pack its projections. `bias` is that of attention."""
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
            "rope_theta", "rope_scaling")  # fmt: skip
    config = LlamaConfig(**{key: raw[key] for key in kept if key in raw}, attention_bias=raw.get("bias", False))
    config.architectures = ["LlamaForCausalLM"]
    return config


def _llama(text: PretrainedConfig) -> dict[str, Any]:
    return {"has_qkv_bias": text.attention_bias, "has_out_bias": text.attention_bias, "has_mlp_bias": text.mlp_bias}


def _mistral(text: PretrainedConfig) -> dict[str, Any]:
    return {"windows": (text.sliding_window,) * text.num_hidden_layers if text.sliding_window else ()}


def _qwen2(text: PretrainedConfig) -> dict[str, Any]:
    return {"has_qkv_bias": True, "windows": _typed_windows(text)}


def _qwen3(text: PretrainedConfig) -> dict[str, Any]:
    bias = text.attention_bias
    return {"has_qkv_bias": bias, "has_out_bias": bias, "has_qk_norm": True, "windows": _typed_windows(text)}


def _typed_windows(text: PretrainedConfig) -> tuple[int | None, ...]:
    """Per layer, from `layer_types`; empty where no layer slides."""
    types = getattr(text, "layer_types", None) or []
    if "sliding_attention" not in types:
        return ()
    return tuple(text.sliding_window if layer_type == "sliding_attention" else None for layer_type in types)


_FAST: dict[str, Callable[[PretrainedConfig], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen2_vl_text": _qwen2,
    "qwen2_5_vl_text": _qwen2,
    "qwen3": _qwen3,
}
