"""Root-mean-square normalisation (Zhang and Sennrich, 2019), computed in float32 as the reference does."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.layers.linear import Source


class RMSNorm(nn.Module):
    def __init__(self, size: int, *, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.size = (size,)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, size) → the same shape and dtype."""
        if x.dtype is torch.float32:
            return F.rms_norm(x, self.size, self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), self.size, None, self.eps).to(x.dtype)

    def sources(self, name: str) -> list[Source]:
        return [Source(f"{name}.weight", self.weight, slice(None), None)]
