"""Linear layers that hold one rank's part of a checkpoint's matrices.

Column-parallel layers split the output and need no collective; row-parallel ones split the input and sum over ranks. Every layer lists
its `sources`: which rows and columns of which checkpoint tensor fill which of its own rows, so that one loader serves all. Once they
are filled, `pack` lays the weights out for the processor.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from engine.layers.int8 import quantize
from engine.layers.packed import linear, pack
from engine.layers.parallel import ParallelGroup


@dataclass(frozen=True, slots=True)
class Source:
    """A piece of a checkpoint tensor and where it belongs."""

    name: str  # canonical checkpoint name
    target: Tensor  # a view of a parameter
    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice | None = field(default_factory=lambda: slice(None))  # None: a vector


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `start … stop` of the matrix called `name`."""

    name: str
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


class ColumnLinear(nn.Module):
    """Several matrices over one input, as one matrix: q, k, v or gate, up. This rank computes its rows of each."""

    def __init__(self, in_features: int, parts: tuple[Part, ...], *, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.parts = parts
        self.sizes = [part.num_rows for part in parts]
        self.weight = nn.Parameter(torch.empty(sum(self.sizes), in_features, dtype=dtype, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(sum(self.sizes), dtype=dtype, device=device), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (num_tokens, in_features) → (num_tokens, sum of the parts' rows), parts side by side."""
        return linear(x, self.weight, self.bias)

    def pack(self, *, in_8bit: bool) -> None:
        if in_8bit:
            quantize(self)
        else:
            self.weight = pack(self.weight)

    def sources(self, prefix: str) -> list[Source]:
        found, row = [], 0
        for part in self.parts:
            here, rows = slice(row, row + part.num_rows), slice(part.start, part.stop)
            found.append(Source(f"{prefix}{part.name}.weight", self.weight[here], rows))
            if self.bias is not None:
                found.append(Source(f"{prefix}{part.name}.bias", self.bias[here], rows, None))
            row += part.num_rows
        return found


class RowLinear(nn.Module):
    """A matrix of which this rank holds input columns `start … stop`; the ranks' results are summed."""

    def __init__(
        self, start: int, stop: int, out_features: int, *, bias: bool, group: ParallelGroup, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.start, self.stop = start, stop
        self.group = group
        self.weight = nn.Parameter(torch.empty(out_features, stop - start, dtype=dtype, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (num_tokens, stop - start) → (num_tokens, out_features), the same on every rank."""
        if self.group.size == 1:
            return linear(x, self.weight, self.bias)
        out = self.group.all_reduce(linear(x, self.weight))
        return out if self.bias is None else out + self.bias  # once, not once per rank

    def pack(self, *, in_8bit: bool) -> None:
        if in_8bit:
            quantize(self, group=self.group)
        else:
            self.weight = pack(self.weight)

    def sources(self, prefix: str) -> list[Source]:
        found = [Source(f"{prefix}.weight", self.weight, slice(None), slice(self.start, self.stop))]
        if self.bias is not None:
            found.append(Source(f"{prefix}.bias", self.bias, slice(None), None))
        return found
