"""A low-rank adapter in PEFT's layout, merged into the weights while they are read: W + scale · B A, and modules that replace the base's.

Knows nothing of ranks or of models: a caller asks for the rows and columns of the tensor that it holds.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from engine.models.registry import UnsupportedModelError
from engine.models.weights import Checkpoint, canonical

_PREFIX = "base_model.model."
_MATRIX = re.compile(r"(.*)\.lora_([AB])(?:\.default)?\.weight")
_SAVED = re.compile(r"\.modules_to_save(?:\.default)?\.|\.base_layer\.")


@dataclass(frozen=True, slots=True)
class _Update:
    """What is added to one matrix: scale · up @ down, transposed where the base keeps its matrix so."""

    down: Tensor  # (rank, in_features)
    up: Tensor  # (out_features, rank)
    scale: float
    is_transposed: bool

    def piece(self, rows: slice, columns: slice | None) -> Tensor:
        if self.is_transposed:
            return (self.scale * (self.up.float() @ self.down.float())).T[rows, columns or slice(None)]
        return self.scale * (self.up[rows].float() @ self.down[:, columns or slice(None)].float())


class Lora:
    """One adapter, in memory. Names are canonical. Raises UnsupportedModelError where the folder holds none that can be merged."""

    def __init__(self, folder: str) -> None:
        path = Path(folder)
        if not (path / "adapter_config.json").is_file():
            raise UnsupportedModelError(f"{folder} holds no adapter_config.json: it is no LoRA in PEFT's layout")
        config: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
        _check(config, folder)
        self.folder = folder
        self.updates: dict[str, _Update] = {}
        self.saved: dict[str, Tensor] = {}  # whole tensors that replace the base's
        self._read(_tensors(path), config)

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding that the adapter brings, None where it brings none."""
        embedding = self.saved.get("embed_tokens.weight")
        return None if embedding is None else embedding.shape[0]

    def resize(self, config: PretrainedConfig) -> None:
        """Give the config the adapter's vocabulary."""
        if self.vocab_size is not None:
            config.get_text_config().vocab_size = self.vocab_size

    def merge_into(self, model: PreTrainedModel) -> None:
        """Add everything to a whole model of the reference library."""
        if self.vocab_size is not None:
            model.resize_token_embeddings(self.vocab_size)
        parameters = {canonical(name): parameter.data for name, parameter in model.named_parameters()}
        _check_names(self, parameters)
        for name, tensor in self.saved.items():
            if name in parameters:
                parameters[name].copy_(tensor)
        for name, update in self.updates.items():
            parameters[name].copy_(parameters[name].float() + update.piece(slice(None), None).to(parameters[name].device))

    def _read(self, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        matrices: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            plain = canonical(_SAVED.sub(".", name.removeprefix(_PREFIX)))
            if found := _MATRIX.fullmatch(plain):
                matrices.setdefault(f"{found[1]}.weight", {})[found[2]] = tensor
            elif "lora_" in plain:
                raise UnsupportedModelError(f"{self.folder}: {name} is of a kind of adapter that cannot be merged, only linear layers' can")
            else:
                self.saved[plain] = tensor
        for name, pair in matrices.items():
            if set(pair) != {"A", "B"}:
                raise UnsupportedModelError(f"{self.folder}: {name} has only one of its two matrices")
            scale = _scale(config, name.removesuffix(".weight"), rank=pair["A"].shape[0])
            self.updates[name] = _Update(pair["A"], pair["B"], scale, bool(config.get("fan_in_fan_out")))


class MergedCheckpoint:
    """A checkpoint with an adapter merged in."""

    def __init__(self, base: Checkpoint, lora: Lora) -> None:
        _check_names(lora, base)
        self._base = base
        self._lora = lora

    def __contains__(self, name: str) -> bool:
        return name in self._lora.saved or name in self._base

    def read(self, name: str, rows: slice, columns: slice | None) -> Tensor:
        saved = self._lora.saved.get(name)
        if saved is not None:
            return saved[rows] if columns in (None, slice(None)) else saved[rows, columns]
        piece = self._base.read(name, rows, columns)
        update = self._lora.updates.get(name)
        return piece if update is None else piece.float() + update.piece(rows, columns)


def _check(config: dict[str, Any], folder: str) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA" or config.get("use_dora"):
        raise UnsupportedModelError(f"{folder}: a {'DoRA' if config.get('use_dora') else kind} adapter cannot be merged, only a LoRA")


def _check_names(lora: Lora, base: Any) -> None:
    """Refuses an adapter for another model: nothing of it may be left out in silence."""
    unknown = [name for name in lora.updates if name not in base]
    unknown += [name for name in lora.saved if name not in base and name != "lm_head.weight"]  # a tied head is the embedding
    if unknown:
        raise UnsupportedModelError(f"{lora.folder} changes {len(unknown)} tensors that the model does not have, among them {unknown[0]}")


def _scale(config: dict[str, Any], module: str, *, rank: int) -> float:
    """PEFT's rule: alpha / rank, or over its square root; patterns name exceptions."""
    alpha = float(_by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", rank)))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)), default)


def _tensors(path: Path) -> dict[str, Tensor]:
    if (path / "adapter_model.safetensors").is_file():
        return load_file(path / "adapter_model.safetensors")
    if (path / "adapter_model.bin").is_file():
        return dict(torch.load(path / "adapter_model.bin", map_location="cpu", weights_only=True))
    raise UnsupportedModelError(f"{path} holds neither adapter_model.safetensors nor adapter_model.bin")
