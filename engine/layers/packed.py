"""Matrix products over weights that oneDNN laid out for this CPU once, after loading.

Two to three times as fast as over row-major weights, from one row to a whole prompt. Where oneDNN has no such product (another device or
type), weights stay as they are and the product is torch's own, against which this one is tested.
"""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.layers.int8 import Int8Weight

# oneDNN chooses the layout for a number of rows; this one was as fast as any other from 1 row to 512.
_TYPICAL_ROWS = 16


def linear(x: Tensor, weight: Tensor | Int8Weight, bias: Tensor | None = None) -> Tensor:
    """x: (…, in_features); weight: (out_features, in_features), packed or not, or in int8 → (…, out_features)."""
    if isinstance(weight, Int8Weight):
        return weight.product(x, bias)
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def pack(weight: nn.Parameter) -> nn.Parameter:
    """The same matrix in oneDNN's layout, or the given one where that cannot be. It takes as much memory."""
    if not _can_pack(weight):
        return weight
    return nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS), requires_grad=False)


def pack_linears(module: nn.Module, *, in_8bit: bool = False) -> None:
    """Replace every plain `nn.Linear` inside, in place: for modules of the reference library.

    in_8bit: in int8, but for the vocabulary's head and what looks at pictures.
    """
    for name, child in module.named_children():
        child_in_8bit = in_8bit and name not in _NEVER_IN_8BIT
        if type(child) is nn.Linear:  # not its subclasses, whose owners may read the weight themselves
            setattr(module, name, PackedLinear(child, in_8bit=child_in_8bit))
        else:
            pack_linears(child, in_8bit=child_in_8bit)


_NEVER_IN_8BIT = frozenset({"lm_head", "embed_out", "visual", "vision_tower", "vision_model", "multi_modal_projector", "connector"})


class PackedLinear(nn.Module):
    """Stands in for an `nn.Linear`."""

    def __init__(self, plain: nn.Linear, *, in_8bit: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight: nn.Parameter | Int8Weight
        self.weight = Int8Weight(plain.weight) if in_8bit else pack(nn.Parameter(plain.weight, requires_grad=False))
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not weight.numel() or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype is torch.float32 or (weight.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
