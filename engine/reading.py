"""What requests read off their own prompts, chunk by chunk: sums of hidden states, and log-probabilities of the prompt's tokens.

Knows nothing of how requests are scheduled; a chunk says what it wants.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.batch import Batch
from engine.request import Chunk, TokenLogprobs
from engine.sampler import token_logprobs

SCORED_ROWS = 64  # whose logits are in memory at once


@dataclass(slots=True)
class Reading:
    """What was read of one prompt so far."""

    hidden_sum: Tensor | None = None  # (hidden_size,) float64 on the CPU
    num_rows: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def add(self, other: "Reading") -> None:
        """What the next chunk gave."""
        if other.hidden_sum is not None:
            self.hidden_sum = other.hidden_sum if self.hidden_sum is None else self.hidden_sum + other.hidden_sum
        self.num_rows += other.num_rows
        self.logprobs += other.logprobs

    def mean(self) -> list[float] | None:
        """(hidden_size,)."""
        return None if self.hidden_sum is None else (self.hidden_sum / self.num_rows).tolist()


def read_chunks(batch: Batch, hidden: Tensor, logits_of: Callable[[Tensor], Tensor | None]) -> dict[str, Reading]:
    """What each chunk that reads gives; on ranks above 0 it only takes part.

    hidden: (num_tokens, hidden_size), normalised. logits_of: rows of it → (num_rows, vocab_size), None on ranks above 0.
    """
    readings = {}
    for start, chunk in zip(batch.starts, batch.chunks, strict=True):
        if not chunk.pools and chunk.next_token_ids is None:
            continue
        rows = hidden[start : start + len(chunk.token_ids)]
        reading = readings[chunk.request_id] = Reading(num_rows=len(chunk.token_ids))
        if chunk.pools:
            reading.hidden_sum = rows.double().sum(0).cpu()
        if chunk.next_token_ids:
            reading.logprobs = _score(chunk, rows, logits_of)
    return readings


def _score(chunk: Chunk, rows: Tensor, logits_of: Callable[[Tensor], Tensor | None]) -> list[TokenLogprobs]:
    assert chunk.next_token_ids is not None
    next_token_ids = torch.tensor(chunk.next_token_ids, device=rows.device)
    scored: list[TokenLogprobs] = []
    for part, token_ids in zip(_parts(rows[: len(next_token_ids)]), _parts(next_token_ids), strict=True):
        logits = logits_of(part)
        if logits is not None:
            scored += token_logprobs(logits.float(), token_ids, [chunk.num_top] * len(token_ids))
    return scored


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(rows[start : start + SCORED_ROWS] for start in range(0, len(rows), SCORED_ROWS))
