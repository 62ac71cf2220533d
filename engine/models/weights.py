"""Checkpoints as named tensors, read piece by piece: safetensors, GGUF, dummy weights, and InternLM2's packed layout.

Names are canonical: the reference's, without the prefixes that place the decoder inside a larger model, so that one loader serves text
and image-text checkpoints, old layouts and new. Knows nothing of ranks: a caller asks for the rows and columns that it holds.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from engine.layers.linear import Source
from engine.models.registry import GGUF_SUFFIX, UnsupportedModelError

_PREFIXES = ("model.", "language_model.", "text_model.")
_INTERNLM2_NAMES = {
    "tok_embeddings.weight": "embed_tokens.weight",
    "output.weight": "lm_head.weight",
    ".attention.wo.": ".self_attn.o_proj.",
    ".attention.wqkv.": ".self_attn.qkv_proj.",
    ".feed_forward.w1.": ".mlp.gate_proj.",
    ".feed_forward.w2.": ".mlp.down_proj.",
    ".feed_forward.w3.": ".mlp.up_proj.",
    ".attention_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
}


class Checkpoint(Protocol):
    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str, rows: slice, columns: slice | None) -> Tensor:
        """A copy or view of a matrix's piece; of a vector's where `columns` is None. Raises KeyError for an unknown name."""


def canonical(name: str) -> str:
    """`model.language_model.layers.0…`, `language_model.model.layers.0…` and `model.layers.0…` all become `layers.0…`.

    Towers lose the level that older releases of the reference wrote: `vision_tower.vision_model.…`.
    """
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name[len(prefix) :]
    return name.replace("vision_tower.vision_model.", "vision_tower.", 1)


class SafetensorsCheckpoint:
    """One file or shards with an index, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            raise UnsupportedModelError(f"{folder} holds no *.safetensors; convert the checkpoint, or name a GGUF file")
        self._names: dict[str, tuple[Any, str]] = {}
        for file in files:
            handle = safe_open(folder / file, framework="pt")
            self._names |= {canonical(name): (handle, name) for name in handle.keys()}  # noqa: SIM118 - not a dict

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str, rows: slice, columns: slice | None) -> Tensor:
        handle, stored_name = self._names[name]
        whole = handle.get_slice(stored_name)
        if len(whole.get_shape()) == 0:
            return handle.get_tensor(stored_name)
        return whole[rows] if columns in (None, slice(None)) else whole[rows, columns]


class DictCheckpoint:
    """Tensors that are in memory already."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = {canonical(name): tensor for name, tensor in tensors.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def read(self, name: str, rows: slice, columns: slice | None) -> Tensor:
        tensor = self._tensors[name]
        if tensor.dim() == 0:
            return tensor
        return tensor[rows] if columns in (None, slice(None)) else tensor[rows, columns]


class InternLM2Checkpoint:
    """Another checkpoint under Llama's names. `wqkv` holds, for each KV head, its query heads, its key head and its value head."""

    def __init__(self, folder: Path, config: PretrainedConfig) -> None:
        stored = SafetensorsCheckpoint(folder)
        self._stored = stored
        self._names = {_from_internlm2(name): name for name in stored._names}
        self.queries_per_group = config.num_attention_heads // config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads

    def __contains__(self, name: str) -> bool:
        return self._packed_name(name) in self._names

    def read(self, name: str, rows: slice, columns: slice | None) -> Tensor:
        stored_name = self._names[self._packed_name(name)]
        if stored_name == self._names.get(name):
            return self._stored.read(stored_name, rows, columns)
        packed = self._stored.read(stored_name, slice(None), None)
        groups = packed.unflatten(0, (-1, self.queries_per_group + 2, self.head_dim))
        first = {"q": 0, "k": self.queries_per_group, "v": self.queries_per_group + 1}[name.split(".self_attn.")[1][0]]
        count = self.queries_per_group if first == 0 else 1
        return groups[:, first : first + count].flatten(0, 2)[rows]

    @staticmethod
    def _packed_name(name: str) -> str:
        for part in ("q_proj", "k_proj", "v_proj"):
            name = name.replace(f".self_attn.{part}.", ".self_attn.qkv_proj.")
        return name


def _from_internlm2(name: str) -> str:
    for theirs, ours in _INTERNLM2_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def open_checkpoint(model_folder: str, config: PretrainedConfig, *, load_format: str, dtype: torch.dtype, seed: int) -> Checkpoint:
    """The weights under `model_folder` (a folder or a GGUF file), or random ones with `load_format` "dummy"."""
    path = Path(model_folder)
    if load_format == "dummy":
        return DictCheckpoint(_dummy_tensors(config, dtype, seed))
    if path.suffix == GGUF_SUFFIX:
        return DictCheckpoint(_gguf_tensors(path, config))
    if (path / "config.json").is_file() and json.loads((path / "config.json").read_text()).get("model_type") == "internlm2":
        return InternLM2Checkpoint(path, config)
    return SafetensorsCheckpoint(path)


def check_names(sources: list[Source], checkpoint: Checkpoint) -> None:
    """Raises UnsupportedModelError naming what is missing."""
    missing = [source.name for source in sources if source.name not in checkpoint]
    if missing:
        raise UnsupportedModelError(f"the checkpoint lacks {len(missing)} of {len(sources)} tensors, among them {', '.join(missing[:3])}")


def fill(sources: list[Source], checkpoint: Checkpoint) -> None:
    """Copy every source into its target, converting to the target's dtype. Raises UnsupportedModelError where the shapes differ."""
    for source in sources:
        piece = checkpoint.read(source.name, source.rows, source.columns)
        if piece.shape != source.target.shape:
            raise UnsupportedModelError(
                f"{source.name}: the checkpoint gives {tuple(piece.shape)}, its config {tuple(source.target.shape)}"
            )
        source.target.copy_(piece)


def fill_module(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy every parameter and persistent buffer of one of the reference's modules from the checkpoint."""
    tensors: Iterable[tuple[str, Tensor]] = module.state_dict(keep_vars=True).items()
    sources = [Source(canonical(name), tensor.data, slice(None), None) for name, tensor in tensors]
    check_names(sources, checkpoint)
    fill(sources, checkpoint)


def reference_class(config: PretrainedConfig) -> Any:
    """The auto class that builds the reference model of a config."""
    return AutoModelForImageTextToText if getattr(config, "vision_config", None) is not None else AutoModelForCausalLM


def _dummy_tensors(config: PretrainedConfig, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """The reference's own random initialisation: equal on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = reference_class(config).from_config(config, dtype=dtype)
    return dict(model.state_dict())


def _gguf_tensors(path: Path, config: PretrainedConfig) -> dict[str, Tensor]:
    """Every tensor, dequantised to float32, under the reference's names."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors: dict[str, Tensor] = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    return tensors
