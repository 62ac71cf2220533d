"""A plan's chunks as packed tensors: what the model reads in one step. No policy, no model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.request import Chunk, Plan


@dataclass(frozen=True, slots=True)
class ImageRows:
    """Rows of the packed hidden states that an image's embedding overwrites."""

    content_hash: bytes
    start: int  # first packed row
    offset: int  # first row of the embedding
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Batch:
    """All chunks of one step, one after the other."""

    chunks: tuple[Chunk, ...]
    starts: tuple[int, ...]  # first packed row of each chunk
    token_ids: Tensor  # (num_tokens,) int64
    positions: Tensor  # (num_tokens,) or (3, num_tokens) int64
    slots: Tensor  # (num_tokens,) int64: where each token's keys and values are stored
    sample_rows: Tensor  # (num_samples,) int64: the last packed row of each chunk that samples
    sample_ids: tuple[str, ...]  # their requests
    image_rows: tuple[ImageRows, ...]


def build_batch(plan: Plan, *, block_size: int, device: torch.device) -> Batch:
    starts, num_tokens = [], 0
    for chunk in plan.chunks:
        starts.append(num_tokens)
        num_tokens += len(chunk.token_ids)
    samples = [
        (start + len(chunk.token_ids) - 1, chunk.request_id) for start, chunk in zip(starts, plan.chunks, strict=True) if chunk.samples
    ]
    return Batch(
        chunks=plan.chunks,
        starts=tuple(starts),
        token_ids=torch.tensor([token_id for chunk in plan.chunks for token_id in chunk.token_ids], device=device),
        positions=torch.tensor(_positions(plan.chunks), device=device),
        slots=torch.tensor([slot for chunk in plan.chunks for slot in _slots(chunk, block_size)], device=device),
        sample_rows=torch.tensor([row for row, _ in samples], dtype=torch.int64, device=device),
        sample_ids=tuple(request_id for _, request_id in samples),
        image_rows=tuple(
            ImageRows(piece.content_hash, start + piece.row, piece.offset, piece.num_tokens)
            for start, chunk in zip(starts, plan.chunks, strict=True)
            for piece in chunk.image_pieces
        ),
    )


def _positions(chunks: tuple[Chunk, ...]) -> list[int] | list[list[int]]:
    """One axis where no chunk has more; else three, an ordinary chunk's positions repeated on each."""
    if all(chunk.positions is None for chunk in chunks):
        return [position for chunk in chunks for position in _ordinary_positions(chunk)]
    return [
        [position for chunk in chunks for position in (_ordinary_positions(chunk) if chunk.positions is None else chunk.positions[axis])]
        for axis in range(3)
    ]


def _ordinary_positions(chunk: Chunk) -> range:
    return range(chunk.start, chunk.start + len(chunk.token_ids))


def _slots(chunk: Chunk, block_size: int) -> list[int]:
    """Cache rows of the chunk's slots: slot i of the sequence is in its block i // block_size."""
    return [chunk.block_ids[i // block_size] * block_size + i % block_size for i in _ordinary_positions(chunk)]
