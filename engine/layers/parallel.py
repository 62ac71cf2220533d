"""Tensor parallelism: which part of a layer a rank holds, and the two collectives that put parts together.

A shard is a whole number of units (KV groups, rows): with 3 KV groups two ranks hold 2 and 1, and of four ranks one holds none.
Nothing is padded, so no result changes. Knows nothing of models; starts no process.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ParallelGroup:
    """This rank's place among the tensor-parallel ranks. With `size` 1 no collective is called."""

    rank: int = 0
    size: int = 1

    def shard(self, num_units: int) -> tuple[int, int]:
        """The units `start … stop` that this rank holds; earlier ranks hold at most one more."""
        return split_range(num_units, self.rank, self.size)

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(partial)
        return partial

    def all_reduce_max(self, partial: Tensor) -> Tensor:
        """The largest over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(partial, op=dist.ReduceOp.MAX)
        return partial

    def gather_columns(self, shard: Tensor, num_columns: int) -> Tensor | None:
        """All ranks' columns side by side on rank 0, None elsewhere.

        shard: (num_rows, columns of this rank), where columns were split by `shard(num_columns)`.
        """
        if self.size == 1:
            return shard
        widest = split_range(num_columns, 0, self.size)[1]
        padded = shard.new_zeros(shard.shape[0], widest)  # a gather takes equal shapes only
        padded[:, : shard.shape[1]] = shard
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(padded, parts, dst=0)
        if parts is None:
            return None
        ranges = [split_range(num_columns, rank, self.size) for rank in range(self.size)]
        return torch.cat([part[:, : stop - start] for part, (start, stop) in zip(parts, ranges, strict=True)], dim=1)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor on every rank, in place."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor


def split_range(num_units: int, rank: int, size: int) -> tuple[int, int]:
    quotient, remainder = divmod(num_units, size)
    start = rank * quotient + min(rank, remainder)
    return start, start + quotient + (rank < remainder)
