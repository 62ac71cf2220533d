"""Weights in int8 with a scale per row: a quarter of float32's memory, written out again for each product.

The plain version, as slow as that sounds; faster products are tested against it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.layers.parallel import ParallelGroup


class Int8Weight(nn.Module):
    """Stands in for a weight: row i is `values[i] * scales[i]`, off by half a scale at most."""

    values: Tensor  # (out_features, in_features) int8
    scales: Tensor  # (out_features, 1), the weight's dtype

    def __init__(self, weight: Tensor, *, group: ParallelGroup | None = None) -> None:
        """`group`: where each rank holds some of the columns, so that all scale a row alike."""
        super().__init__()
        largest = weight.detach().float().abs().amax(1, keepdim=True)
        if group is not None:
            group.all_reduce_max(largest)
        scales = torch.where(largest > 0, largest / 127, 1.0)
        self.register_buffer("values", (weight.detach().float() / scales).round_().to(torch.int8))
        self.register_buffer("scales", scales.to(weight.dtype))

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: (…, in_features) → (…, out_features)."""
        return F.linear(x, self.values.to(x.dtype) * self.scales, bias)


def quantize(module: nn.Module, *, group: ParallelGroup | None = None) -> None:
    """Put an Int8Weight in the place of a module's weight."""
    weight = module.get_parameter("weight")
    del module.weight
    module.weight = Int8Weight(weight, group=group)
