"""Rotary position embedding (Su et al., 2021), the half-split form of the reference, with its scaling rules.

Three-axis positions (Qwen2-VL: time, height, width) take each frequency from one of the axes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_PLAIN = ("default", "mrope")  # base^(-2i / dim)


def stretch(config: PretrainedConfig, alpha: float) -> None:
    """Make a text config's rotary base right for longer windows: base · alpha^(dim / (dim - 2)), "NTK-aware" scaling.

    The slow frequencies turn alpha times as slowly, the fastest stays. Raises ValueError for a model without one plain base.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in parameters or parameters.get("rope_type", "default") not in _PLAIN:
        raise ValueError(f"--alpha: only 1 is allowed: {config.model_type} has no plain rotary positions, or its config scales them itself")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    parameters["rope_theta"] *= alpha ** (dim / (dim - 2))


class RotaryEmbedding(nn.Module):
    """Cosines and sines for a step's positions, once for all layers."""

    inv_freq: Tensor  # (head_dim / 2,) float32

    def __init__(self, config: PretrainedConfig, *, head_dim: int, device: torch.device) -> None:
        super().__init__()
        parameters = config.rope_parameters
        rope_type = parameters.get("rope_type", "default")
        if rope_type in _PLAIN:
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
            inv_freq, self.scaling = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
        else:
            inv_freq, self.scaling = ROPE_INIT_FUNCTIONS[rope_type](config, device=torch.device("cpu"))
        self.register_buffer("inv_freq", inv_freq.to(device), persistent=False)
        self.sections: Sequence[int] | None = parameters.get("mrope_section")

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions: (num_tokens,) or (3, num_tokens) int64 → cos and sin, each (num_tokens, 1, head_dim)."""
        angles = positions[..., None].float() * self.inv_freq
        if positions.dim() == 2:
            angles = self._choose_axes(angles)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)

    def _choose_axes(self, angles: Tensor) -> Tensor:
        """angles: (3, num_tokens, head_dim / 2) → (num_tokens, head_dim / 2): section i of the frequencies follows axis i."""
        if not self.sections:
            return angles[0]
        return torch.cat([part[axis] for axis, part in enumerate(angles.split(list(self.sections), dim=-1))], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (num_tokens, num_heads, head_dim); cos, sin: (num_tokens, 1, head_dim)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin
