"""The paged cache as the plain backend keeps it. What attention computes from it is compared with the reference in tests/equality."""

import pytest
import torch

from engine.attention import torch_backend
from engine.attention.base import AttentionRule, LayerShape, allocate_cache
from engine.attention.torch_backend import TorchAttention
from engine.batch import build_batch
from engine.request import Chunk, Plan

BLOCK_SIZE, NUM_BLOCKS = 4, 3


@pytest.mark.parametrize("num_kv_heads", [0, 2])  # 0: of four ranks over three groups one holds none
def test_a_step_clears_the_new_tail_and_a_copy_takes_whole_blocks(num_kv_heads):
    backend = backend_of(num_kv_heads)
    plan = Plan((Chunk("a", [5], BLOCK_SIZE, [0, 2]),))

    backend.prepare(build_batch(plan, block_size=BLOCK_SIZE, device=torch.device("cpu")))
    backend.copy_blocks(((0, 1),))

    slots = torch.arange(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.float32)
    expected = torch.cat([slots[:BLOCK_SIZE], slots[:BLOCK_SIZE], torch.zeros(BLOCK_SIZE)])
    for tensor in (backend.caches[0].keys, backend.caches[0].values):
        assert torch.equal(tensor, expected[:, None, None].expand_as(tensor))


def backend_of(num_kv_heads: int) -> TorchAttention:
    """Every slot holds its own number."""
    shape = LayerShape(num_kv_heads, 8, 8)
    caches = allocate_cache([shape], num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=torch.float32, device=torch.device("cpu"))
    for tensor in (caches[0].keys, caches[0].values):
        tensor += torch.arange(len(tensor))[:, None, None]
    return TorchAttention(caches, BLOCK_SIZE)


def test_rows_decoded_in_parts_are_rows_decoded_together(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    backend = backend_of(2)
    chunks = tuple(Chunk(name, [5], start, blocks) for name, start, blocks in (("a", 5, [0, 1]), ("b", 6, [1, 2]), ("c", 3, [2])))
    batch = build_batch(Plan(chunks), block_size=BLOCK_SIZE, device=torch.device("cpu"))
    query, key, value = (torch.randn(3, num_heads, 8, generator=generator) for num_heads in (4, 2, 2))

    def attended(gathered_bytes: int) -> torch.Tensor:
        monkeypatch.setattr(torch_backend, "GATHERED_BYTES", gathered_bytes)
        backend.prepare(batch)
        return backend.attend(0, query, key, value, AttentionRule(scale=1.0))

    assert torch.allclose(attended(1), attended(1 << 30), rtol=1e-6)
