"""The one fast decoder: Llama-shaped models, their differences being fields of a small spec.

Pre-norm blocks of grouped-query attention with rotary positions and a gated feed-forward (Touvron et al., 2023). Works on packed tokens
of many sequences; which tokens see which is the attention backend's affair. Knows nothing of requests, images or files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from engine.attention.base import AttentionBackend, AttentionRule, LayerShape
from engine.layers.embedding import VocabEmbedding
from engine.layers.linear import ColumnLinear, Part, RowLinear, Source
from engine.layers.norm import RMSNorm
from engine.layers.parallel import ParallelGroup
from engine.layers.rotary import RotaryEmbedding, rotate


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """All that distinguishes one Llama-shaped checkpoint from another."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    ties_embeddings: bool
    has_qkv_bias: bool = False
    has_out_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False  # Qwen3: heads of q and k are normalised before rotation
    windows: tuple[int | None, ...] = ()  # per layer; empty: full attention everywhere

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None


@dataclass(frozen=True, slots=True)
class Stage:
    """Parameters of this rank that are filled together, and what is done with them then, e.g. that int8 takes their place."""

    sources: Callable[[], list[Source]]  # made anew each time: to keep them would keep the weights
    finish: Callable[[], None]


class Attention(nn.Module):
    def __init__(self, spec: DecoderSpec, layer: int, *, group: ParallelGroup, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = spec.head_dim
        self.rule = AttentionRule(spec.head_dim**-0.5, spec.window(layer))
        start, stop = group.shard(spec.num_kv_heads)  # whole KV groups: q heads follow their KV head
        per_group = spec.num_heads // spec.num_kv_heads
        self.num_kv_heads, self.num_heads = stop - start, (stop - start) * per_group
        q_rows, kv_rows = per_group * spec.head_dim, spec.head_dim
        parts = (
            Part("q_proj", start * q_rows, stop * q_rows),
            Part("k_proj", start * kv_rows, stop * kv_rows),
            Part("v_proj", start * kv_rows, stop * kv_rows),
        )
        self.qkv = ColumnLinear(spec.hidden_size, parts, bias=spec.has_qkv_bias, dtype=dtype, device=device)
        self.out = RowLinear(
            start * q_rows, stop * q_rows, spec.hidden_size, bias=spec.has_out_bias, group=group, dtype=dtype, device=device
        )
        norms = [RMSNorm(spec.head_dim, eps=spec.norm_eps, dtype=dtype, device=device) for _ in range(2)] if spec.has_qk_norm else []
        self.qk_norms = cast(Sequence[RMSNorm], nn.ModuleList(norms))

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attention: AttentionBackend) -> Tensor:
        heads = self.qkv(hidden).unflatten(1, (self.num_heads + 2 * self.num_kv_heads, self.head_dim))
        query_key, value = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.qk_norms:
            query, key = query_key.split((self.num_heads, self.num_kv_heads), dim=1)
            query_key = torch.cat((self.qk_norms[0](query), self.qk_norms[1](key)), dim=1)
        query, key = rotate(query_key, cos, sin).split((self.num_heads, self.num_kv_heads), dim=1)
        return self.out(attention.attend(self.layer, query, key, value, self.rule).flatten(1))

    def sources(self, prefix: str) -> list[Source]:
        found = self.qkv.sources(prefix) + self.out.sources(f"{prefix}o_proj")
        for name, norm in zip(("q_norm", "k_norm"), self.qk_norms, strict=False):
            found += norm.sources(f"{prefix}{name}")
        return found


class FeedForward(nn.Module):
    def __init__(self, spec: DecoderSpec, *, group: ParallelGroup, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        start, stop = group.shard(spec.intermediate_size)
        self.size = stop - start
        parts = (Part("gate_proj", start, stop), Part("up_proj", start, stop))
        self.gate_up = ColumnLinear(spec.hidden_size, parts, bias=spec.has_mlp_bias, dtype=dtype, device=device)
        self.down = RowLinear(start, stop, spec.hidden_size, bias=spec.has_mlp_bias, group=group, dtype=dtype, device=device)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden).split(self.size, dim=1)
        return self.down(F.silu(gate) * up)

    def sources(self, prefix: str) -> list[Source]:
        return self.gate_up.sources(prefix) + self.down.sources(f"{prefix}down_proj")


class Layer(nn.Module):
    def __init__(self, spec: DecoderSpec, layer: int, *, group: ParallelGroup, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(spec.hidden_size, eps=spec.norm_eps, dtype=dtype, device=device)
        self.attention = Attention(spec, layer, group=group, dtype=dtype, device=device)
        self.mlp_norm = RMSNorm(spec.hidden_size, eps=spec.norm_eps, dtype=dtype, device=device)
        self.mlp = FeedForward(spec, group=group, dtype=dtype, device=device)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attention: AttentionBackend) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), cos, sin, attention)
        return hidden + self.mlp(self.mlp_norm(hidden))

    def pack(self, *, in_8bit: bool) -> None:
        """Lay the loaded weights out for the processor."""
        for linear in (self.attention.qkv, self.attention.out, self.mlp.gate_up, self.mlp.down):
            linear.pack(in_8bit=in_8bit)

    def sources(self, prefix: str) -> list[Source]:
        return (
            self.attention_norm.sources(f"{prefix}input_layernorm")
            + self.attention.sources(f"{prefix}self_attn.")
            + self.mlp_norm.sources(f"{prefix}post_attention_layernorm")
            + self.mlp.sources(f"{prefix}mlp.")
        )


class Decoder(nn.Module):
    """One rank's part of the model. `embed`, `forward` and `logits` are all that the runner calls."""

    def __init__(
        self, spec: DecoderSpec, config: PretrainedConfig, *, group: ParallelGroup, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = VocabEmbedding(spec.vocab_size, spec.hidden_size, group=group, dtype=dtype, device=device)
        layers = [Layer(spec, i, group=group, dtype=dtype, device=device) for i in range(spec.num_layers)]
        self.layers = cast(Sequence[Layer], nn.ModuleList(layers))
        self.norm = RMSNorm(spec.hidden_size, eps=spec.norm_eps, dtype=dtype, device=device)
        self.head = self.embedding
        if not spec.ties_embeddings:
            self.head = VocabEmbedding(spec.vocab_size, spec.hidden_size, group=group, dtype=dtype, device=device)
        self.rotary = RotaryEmbedding(config, head_dim=spec.head_dim, device=device)

    @property
    def layer_shapes(self) -> list[LayerShape]:
        head_dim = self.spec.head_dim
        return [LayerShape(layer.attention.num_kv_heads, head_dim, head_dim) for layer in self.layers]

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids: (num_tokens,) int64 → (num_tokens, hidden_size)."""
        return self.embedding(token_ids)

    def forward(self, hidden: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        """hidden: (num_tokens, hidden_size); positions: (num_tokens,) or (3, num_tokens) → (num_tokens, hidden_size), normalised."""
        cos, sin = self.rotary(positions, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, attention)
        return self.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor | None:
        """hidden: (num_rows, hidden_size) → (num_rows, vocab_size) on rank 0, None elsewhere."""
        return self.head.logits(hidden)

    def stages(self, *, in_8bit: bool = False) -> list[Stage]:
        """What to load, one after the other, by the reference's names without their leading `model.`."""
        layers = [
            Stage(partial(layer.sources, f"layers.{i}."), partial(layer.pack, in_8bit=in_8bit)) for i, layer in enumerate(self.layers)
        ]
        return [*layers, Stage(self._vocabulary_sources, partial(self.head.pack_head, keeps_rows=self.spec.ties_embeddings))]

    def _vocabulary_sources(self) -> list[Source]:
        found = self.embedding.sources("embed_tokens") + self.norm.sources("norm")
        return found if self.spec.ties_embeddings else found + self.head.sources("lm_head")
