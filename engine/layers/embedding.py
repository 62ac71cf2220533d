"""The word embedding and the vocabulary head, split over ranks by rows of the vocabulary; one matrix where the checkpoint ties them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.layers.linear import Source
from engine.layers.packed import linear, pack
from engine.layers.parallel import ParallelGroup


class VocabEmbedding(nn.Module):
    """Rows of the word embedding; also the head's when the checkpoint ties the two."""

    def __init__(self, vocab_size: int, hidden_size: int, *, group: ParallelGroup, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.group = group
        self.start, self.stop = group.shard(vocab_size)
        self.weight = nn.Parameter(torch.empty(self.stop - self.start, hidden_size, dtype=dtype, device=device), requires_grad=False)
        self.head_weight = self.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: (num_tokens,) int64 → (num_tokens, hidden_size), the same on every rank."""
        if self.group.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.start
        is_foreign = (local < 0) | (local >= self.stop - self.start)
        rows = F.embedding(local.masked_fill(is_foreign, 0), self.weight)
        return self.group.all_reduce(rows.masked_fill(is_foreign[:, None], 0))  # one rank's row plus zeros: exact

    def logits(self, hidden: Tensor) -> Tensor | None:
        """hidden: (num_rows, hidden_size) → (num_rows, vocab_size) on rank 0, None elsewhere."""
        return self.group.gather_columns(linear(hidden, self.head_weight), self.vocab_size)

    def pack_head(self, *, keeps_rows: bool) -> None:
        """Lay the matrix out for `logits`. Rows are looked up in the plain one, which goes unless it `keeps_rows`."""
        self.head_weight = pack(self.weight)
        if not keeps_rows:
            self.weight = self.head_weight

    def sources(self, name: str) -> list[Source]:
        return [Source(f"{name}.weight", self.weight, slice(self.start, self.stop))]
