"""What a decoder layer asks of an attention backend, and the KV cache that all backends share.

One backend object serves one rank for its lifetime. `prepare` is called once per step, `attend` once per layer.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer's KV heads on this rank."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    def slot_bytes(self, dtype: torch.dtype) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim) * dtype.itemsize


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's paged keys and values. Slot i of block b is row b * block_size + i."""

    keys: Tensor  # (num_blocks * block_size, num_kv_heads, key_dim), model dtype
    values: Tensor  # (num_blocks * block_size, num_kv_heads, value_dim)


def allocate_cache(
    shapes: list[LayerShape], *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[LayerCache]:
    """Zeroed memory for every layer."""
    num_slots = num_blocks * block_size
    return [
        LayerCache(
            _zeros((num_slots, shape.num_kv_heads, shape.key_dim), dtype, device),
            _zeros((num_slots, shape.num_kv_heads, shape.value_dim), dtype, device),
        )
        for shape in shapes
    ]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On CPU the pages stay untouched, and so cost nothing, until they are used: numpy asks for zeroed ones where torch writes zeros."""
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """What differs between layers."""

    scale: float
    window: int | None = None  # a slot sees itself and window - 1 earlier ones
    softcap: float | None = None


class AttentionBackend(Protocol):
    def prepare(self, batch: Batch) -> None:
        """Build this step's metadata on the device."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """Store the step's keys and values, and attend over each sequence's cached ones.

        query: (num_tokens, num_heads, key_dim); key: (num_tokens, num_kv_heads, key_dim); value: (num_tokens, num_kv_heads, value_dim)
        → (num_tokens, num_heads, value_dim). num_heads is a multiple of num_kv_heads; consecutive heads share a KV head.
        """

    def copy_blocks(self, copies: tuple[tuple[int, int], ...]) -> None:
        """Copy whole blocks (from, to) in every layer."""
