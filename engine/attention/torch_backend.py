"""Paged attention in plain torch: runs anywhere, and is the reference that faster backends are tested against.

Rows that decode are taken together, in groups of like length, over gathered copies of their blocks; each prefill chunk is taken alone.
Heads that share a KV head are folded into the query axis, so grouped-query attention needs no repeated keys.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.base import AttentionRule, LayerCache
from engine.batch import Batch
from engine.request import Chunk

# On a CPU no more keys are gathered at once: what is copied is still in the processor's caches when it is read. 64 rows of 200 slots of a
# small model decode in 137 instead of 168 ms that way.
GATHERED_BYTES = 2 << 20


@dataclass(slots=True)
class _DecodeGroup:
    """Rows with one new slot each, padded to one length."""

    rows: Tensor  # (num_rows,) packed rows
    blocks: Tensor  # (num_rows * max_blocks,)
    lengths: Tensor  # (num_rows,) slots to attend to, the new one included
    max_slots: int
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by window; (num_rows, 1, 1, max_slots)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        if window not in self.masks:
            slots = torch.arange(self.max_slots, device=self.lengths.device)
            is_seen = slots < self.lengths[:, None]
            if window is not None:
                is_seen &= slots >= self.lengths[:, None] - window
            self.masks[window] = _additive(is_seen, dtype)[:, None, None]
        return self.masks[window]


@dataclass(slots=True)
class _PrefillChunk:
    """Several new slots of one sequence."""

    start: int  # packed row
    num_tokens: int
    first_slot: int  # of the sequence
    blocks: Tensor  # (num_blocks,); empty when nothing precedes the chunk
    atomic_ranges: tuple[tuple[int, int], ...]  # rows of the chunk that see each other in both directions
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by window; (num_tokens, slots)

    @property
    def is_plain(self) -> bool:
        """Nothing before it and strictly causal."""
        return self.first_slot == 0 and not self.atomic_ranges

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        if window not in self.masks:
            slots = torch.arange(self.first_slot + self.num_tokens, device=self.blocks.device)
            own = slots[self.first_slot :, None]
            is_seen = slots <= own
            if window is not None:
                is_seen &= slots > own - window
            for start, stop in self.atomic_ranges:
                is_seen[start:stop, self.first_slot + start : self.first_slot + stop] = True
            self.masks[window] = _additive(is_seen, dtype)
        return self.masks[window]


class TorchAttention:
    """See `AttentionBackend`."""

    def __init__(self, caches: list[LayerCache], block_size: int) -> None:
        self.caches = caches
        self.block_size = block_size
        self._slots = torch.empty(0, dtype=torch.int64)
        self._decodes: list[_DecodeGroup] = []
        self._prefills: list[_PrefillChunk] = []

    def prepare(self, batch: Batch) -> None:
        self._slots = batch.slots
        self._clear([block for chunk in batch.chunks if (block := _new_tail(chunk, self.block_size)) is not None])
        chunks = list(zip(batch.starts, batch.chunks, strict=True))
        self._decodes = self._decode_groups([(row, chunk) for row, chunk in chunks if len(chunk.token_ids) == 1])
        self._prefills = [self._prefill_chunk(row, chunk) for row, chunk in chunks if len(chunk.token_ids) > 1]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        if not key.shape[1]:  # a rank without KV heads
            return query.new_empty(*query.shape[:2], value.shape[2])
        cache = self.caches[layer]
        cache.keys.index_copy_(0, self._slots, key)
        cache.values.index_copy_(0, self._slots, value)
        out = query.new_empty(*query.shape[:2], value.shape[2])
        for group in self._decodes:
            out[group.rows] = self._attend_decodes(cache, query[group.rows], group, rule)
        for chunk in self._prefills:
            rows = slice(chunk.start, chunk.start + chunk.num_tokens)
            out[rows] = self._attend_prefill(cache, query[rows], key[rows], value[rows], chunk, rule)
        return out

    def copy_blocks(self, copies: tuple[tuple[int, int], ...]) -> None:
        if not copies:
            return
        sources, targets = (torch.tensor(blocks, device=self.caches[0].keys.device) for blocks in zip(*copies, strict=True))
        for cache in self.caches:
            for tensor in (cache.keys, cache.values):
                blocks = self._blocks_of(tensor)
                blocks[targets] = blocks[sources]

    def _clear(self, block_ids: list[int]) -> None:
        """Zero whole blocks: masked slots take part in sums with weight 0, which a NaN that an earlier owner left would survive."""
        if not block_ids:
            return
        blocks = torch.tensor(block_ids, device=self._slots.device)
        for cache in self.caches:
            for tensor in (cache.keys, cache.values):
                self._blocks_of(tensor).index_fill_(0, blocks, 0)

    def _blocks_of(self, slots: Tensor) -> Tensor:
        """A view (num_blocks, block_size, num_kv_heads, head_dim); a rank may hold no heads."""
        return slots.unflatten(0, (-1, self.block_size))

    def _decode_groups(self, rows: list[tuple[int, Chunk]]) -> list[_DecodeGroup]:
        """Rows whose block counts share a power of two, so that padding at most doubles the work; on a CPU, as many as its caches hold."""
        by_size: dict[int, list[tuple[int, Chunk]]] = {}
        for row, chunk in rows:
            by_size.setdefault((chunk.start // self.block_size).bit_length(), []).append((row, chunk))
        return [self._decode_group(part) for group in by_size.values() for part in self._parts(group)]

    def _parts(self, rows: list[tuple[int, Chunk]]) -> list[list[tuple[int, Chunk]]]:
        if self._slots.device.type != "cpu":
            return [rows]
        row_bytes = max(chunk.start + self.block_size for _, chunk in rows) * max(cache.keys[:1].nbytes for cache in self.caches)
        size = max(1, GATHERED_BYTES // max(1, row_bytes))
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _decode_group(self, rows: list[tuple[int, Chunk]]) -> _DecodeGroup:
        device = self._slots.device
        counts = [chunk.start // self.block_size + 1 for _, chunk in rows]
        widest = max(counts)
        blocks = [
            (*chunk.block_ids[:count], *[chunk.block_ids[0]] * (widest - count)) for (_, chunk), count in zip(rows, counts, strict=True)
        ]
        return _DecodeGroup(
            rows=torch.tensor([row for row, _ in rows], device=device),
            blocks=torch.tensor(blocks, device=device).flatten(),
            lengths=torch.tensor([chunk.start + 1 for _, chunk in rows], device=device),
            max_slots=widest * self.block_size,
        )

    def _prefill_chunk(self, row: int, chunk: Chunk) -> _PrefillChunk:
        num_slots = chunk.start + len(chunk.token_ids)
        num_blocks = -(-num_slots // self.block_size) if chunk.start else 0
        return _PrefillChunk(
            start=row,
            num_tokens=len(chunk.token_ids),
            first_slot=chunk.start,
            blocks=torch.tensor(chunk.block_ids[:num_blocks], dtype=torch.int64, device=self._slots.device),
            atomic_ranges=tuple((piece.row, piece.row + piece.num_tokens) for piece in chunk.image_pieces if piece.is_atomic),
        )

    def _attend_decodes(self, cache: LayerCache, query: Tensor, group: _DecodeGroup, rule: AttentionRule) -> Tensor:
        """query: (num_rows, num_heads, key_dim) → (num_rows, num_heads, value_dim)."""
        num_rows, num_heads, _ = query.shape
        keys, values = (self._gather(tensor, group.blocks, num_rows).transpose(1, 2) for tensor in (cache.keys, cache.values))
        folded = query.unflatten(1, (keys.shape[1], -1))  # (num_rows, num_kv_heads, heads per KV head, key_dim)
        out = _attention(folded, keys, values, group.mask(rule.window, query.dtype), rule)
        return out.reshape(num_rows, num_heads, values.shape[-1])

    def _attend_prefill(
        self, cache: LayerCache, query: Tensor, key: Tensor, value: Tensor, chunk: _PrefillChunk, rule: AttentionRule
    ) -> Tensor:
        """query: (num_tokens, num_heads, key_dim) → (num_tokens, num_heads, value_dim)."""
        num_slots = chunk.first_slot + chunk.num_tokens
        if chunk.first_slot:  # earlier slots are in the cache, and so are the chunk's own by now
            key, value = (self._gather(tensor, chunk.blocks, 1)[0, :num_slots] for tensor in (cache.keys, cache.values))
        folded = query.unflatten(1, (key.shape[1], -1)).permute(1, 2, 0, 3)  # (num_kv_heads, heads per KV head, num_tokens, key_dim)
        keys, values = (tensor.transpose(0, 1)[:, None].expand(-1, folded.shape[1], -1, -1) for tensor in (key, value))
        is_plain = chunk.is_plain and (rule.window is None or num_slots <= rule.window)
        out = _attention(folded, keys, values, None if is_plain else chunk.mask(rule.window, query.dtype), rule, is_causal=is_plain)
        return out.permute(2, 0, 1, 3).flatten(1, 2)

    def _gather(self, tensor: Tensor, blocks: Tensor, num_rows: int) -> Tensor:
        """Blocks of one layer, copied side by side: (num_rows, slots, num_kv_heads, dim)."""
        paged = tensor.view(-1, self.block_size * tensor.shape[1] * tensor.shape[2])
        return paged.index_select(0, blocks).view(num_rows, -1, *tensor.shape[1:])


def _new_tail(chunk: Chunk, block_size: int) -> int | None:
    """The block that the chunk begins and does not fill."""
    end = chunk.start + len(chunk.token_ids)
    first_slot = end - end % block_size
    return chunk.block_ids[first_slot // block_size] if chunk.start <= first_slot < end else None


def _attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, rule: AttentionRule, *, is_causal: bool = False) -> Tensor:
    """Softmax attention; written out where a soft cap on the scores (Gemma 2) rules the fused operator out."""
    if rule.softcap is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=is_causal, scale=rule.scale)
    scores = torch.tanh(query @ keys.transpose(-1, -2) * (rule.scale / rule.softcap)) * rule.softcap
    if is_causal:
        mask = _additive(torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(), scores.dtype)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values


def _additive(is_seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device).masked_fill_(~is_seen, float("-inf"))
