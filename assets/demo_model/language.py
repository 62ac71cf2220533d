"""SmolLM2 for training: frozen weights, low-rank updates, and a forward pass over prefixes with rows of short chats.

A *prefix* (system sentence and picture) is read once. Its *rows* hold *turns* (question and answer) end to end; a turn sees
the prefix and itself, so each is exactly a chat of its own, and positions run on from the prefix in each:

    prefix  p p p p p p ─┬─ q q a a|q a a a|q q q a
                         └─ q q q q a a a a|q q a a      a text chat in a row sees no prefix and counts from zero

What sees what is said by masks, so the shapes never change and one compiled layer serves all steps.
Shapes: B prefixes of P tokens, with R rows of L tokens each; N = B * (P + R * L). Knows nothing of scenes or losses.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu

from assets.demo_model.assemble import UPDATED, language_config, language_weights

# Rank of the update of each fused linear; all of it is 5.7M numbers (11 MB) for 30 layers.
RANKS = {"self_attn.qkv_proj": 32, "self_attn.o_proj": 16, "mlp.gate_up_proj": 24, "mlp.down_proj": 16}
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tokens stand and what they see; a True in a mask lets the row's token see the column's.

    Positions: prefix (B, P), rows (B, R, L). Masks: prefix (B, P, P), past (B, R, L, P), own (B, R, L, L).
    """

    prefix_positions: torch.Tensor
    row_positions: torch.Tensor
    prefix_mask: torch.Tensor
    past_mask: torch.Tensor
    own_mask: torch.Tensor


class PackedLanguageModel(nn.Module):
    """The language model with its updates. Frozen weights and activations are in `dtype`; the updates are float32 parameters."""

    def __init__(self, gguf_path: Path, dtype: torch.dtype = torch.bfloat16, *, is_compiled: bool = False) -> None:
        super().__init__()
        self.config = language_config(gguf_path)
        self.dtype = dtype
        frozen = {name: weight.to(dtype) for name, weight in language_weights(gguf_path)}
        self.embedding = frozen["model.embed_tokens.weight"]
        self.final_norm = frozen["model.norm.weight"]
        num_layers = self.config["num_hidden_layers"]
        self.layers = [_fused(frozen, f"model.layers.{i}.") for i in range(num_layers)]
        self.updates = nn.ParameterDict(
            {_key(i, name, part): _new_update(weights[name].shape, rank, part) for i, weights in enumerate(self.layers)
             for name, rank in RANKS.items() for part in ("lora_down", "lora_up")}
        )  # fmt: skip
        self.run_layer = torch.compile(_layer, dynamic=False) if is_compiled else _layer

    def forward(self, prefix: torch.Tensor, rows: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Embeddings (B, P, hidden) and (B, R, L, hidden) → final hidden states of the rows, (B, R, L, hidden)."""
        num_prefix = prefix.shape[0] * prefix.shape[1]
        hidden = torch.cat([prefix.flatten(0, 1), rows.flatten(0, 2)]).to(self.dtype)
        rotary = self._rotary(torch.cat([layout.prefix_positions.flatten(), layout.row_positions.flatten()]))
        masks = [_bias(mask, self.dtype) for mask in (layout.prefix_mask, layout.past_mask, layout.own_mask)]
        for i, weights in enumerate(self.layers):
            updates = {name: [self.updates[_key(i, name, part)].to(self.dtype) for part in ("lora_down", "lora_up")] for name in RANKS}
            hidden = self.run_layer(hidden, weights, updates, rotary, masks, self.config)
        return rms_norm(hidden[num_prefix:], hidden.shape[-1:], self.final_norm, self.config["rms_norm_eps"]).view(rows.shape)

    def named_updates(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The trained numbers under the names that `assemble.py` reads."""
        for key, value in self.updates.items():
            yield f"model.layers.{key.replace('-', '.')}", value

    def _rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines for (N,) positions, (N, 1, head_dim) each."""
        dim = self.config["head_dim"]
        angles = positions[:, None] / self.config["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


class UpdatedLinear(torch.autograd.Function):
    """`x @ weight.T + x @ down.T @ up.T` as one product, `[x, x @ down.T] @ [weight, up].T`; so is its backward pass.

    Two products and a sum are three times slower on a CPU, as they write and read the wide result three times.
    """

    @staticmethod
    def forward(ctx, values, weight, down, up):
        both = torch.cat([values, values @ down.T], dim=1)
        wide = torch.cat([weight, up], dim=1)
        ctx.save_for_backward(both, wide, down)
        return both @ wide.T

    @staticmethod
    def backward(ctx, gradient):
        both, wide, down = ctx.saved_tensors
        num_in = down.shape[1]
        to_values, to_reduced = (gradient @ wide).split([num_in, down.shape[0]], dim=1)
        values, reduced = both.split([num_in, down.shape[0]], dim=1)
        return torch.addmm(to_values, to_reduced, down), None, to_reduced.T @ values, (reduced.T @ gradient).T


def _key(layer: int, name: str, part: str) -> str:
    return f"{layer}-{name}-{part}".replace(".", "-")


def _fused(frozen: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """A layer's weights under the names of `UPDATED`, those that share an input stacked into one."""
    weights = {name: torch.cat([frozen[f"{prefix}{part}.weight"] for part in parts]) for name, parts in UPDATED.items()}
    return weights | {norm: frozen[f"{prefix}{norm}.weight"] for norm in NORMS}


def _new_update(shape: torch.Size, rank: int, part: str) -> nn.Parameter:
    """Half of an update that starts at zero: the way up is zero, the way down random."""
    return nn.Parameter(torch.zeros(shape[0], rank) if part == "lora_up" else torch.randn(rank, shape[1]) / shape[1] ** 0.5)


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Zero where seen, very negative elsewhere (finite: a padding token may see nothing at all)."""
    return torch.where(mask, 0.0, -30000.0).to(dtype)


def _layer(hidden: torch.Tensor, weights: dict, updates: dict, rotary: tuple, masks: list, config: dict) -> torch.Tensor:
    """One decoder layer over all tokens, (N, hidden) → (N, hidden)."""

    def updated(values: torch.Tensor, name: str) -> torch.Tensor:
        return UpdatedLinear.apply(values, weights[name], *updates[name])

    def normed(norm: str) -> torch.Tensor:
        return rms_norm(hidden, hidden.shape[-1:], weights[norm], config["rms_norm_eps"])

    attended = _attend(updated(normed(NORMS[0]), "self_attn.qkv_proj"), rotary, masks, config)
    hidden = hidden + updated(attended, "self_attn.o_proj")
    gate, up = updated(normed(NORMS[1]), "mlp.gate_up_proj").chunk(2, dim=-1)
    return hidden + updated(silu(gate) * up, "mlp.down_proj")


def _attend(qkv: torch.Tensor, rotary: tuple, masks: list, config: dict) -> torch.Tensor:
    """Grouped-query attention in the prefixes, and from the rows to their prefix and themselves. Returns (N, heads * head_dim)."""
    prefix_bias, past_bias, own_bias = masks
    b, p, (r, length) = prefix_bias.shape[0], prefix_bias.shape[1], own_bias.shape[1:3]
    num_heads, kv, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    group = num_heads // kv
    q, k, v = qkv.view(-1, num_heads + 2 * kv, dim).split([num_heads, kv, kv], dim=1)
    q, k = _rotated(q, rotary) * dim**-0.5, _rotated(k, rotary)
    (pq, rq), (pk, rk), (pv, rv) = (x.split([b * p, b * r * length]) for x in (q, k, v))

    # Prefixes: (B, kv, group * P, d) over (B, kv, P, d). The heads of a group are folded into the rows, as they share their keys.
    pq = pq.reshape(b, p, kv, group, dim).permute(0, 2, 3, 1, 4).reshape(b, kv, group * p, dim)
    pk, pv = (x.reshape(b, p, kv, dim).transpose(1, 2) for x in (pk, pv))
    scores = (pq @ pk.transpose(-1, -2)).view(b, kv, group, p, p) + prefix_bias[:, None, None]
    past = scores.softmax(-1).view(b, kv, group * p, p) @ pv
    past = past.view(b, kv, group, p, dim).permute(0, 3, 1, 2, 4).reshape(b * p, -1)

    # Rows: (B, kv, R * group * L, d) over the prefix's (B, kv, P, d), and (B, kv, R, group * L, d) over their own (B, kv, R, L, d).
    rq = rq.reshape(b, r, length, kv, group, dim).permute(0, 3, 1, 4, 2, 5).reshape(b, kv, r * group * length, dim)
    rk, rv = (x.reshape(b, r, length, kv, dim).permute(0, 3, 1, 2, 4) for x in (rk, rv))
    to_past = (rq @ pk.transpose(-1, -2)).view(b, kv, r, group, length, p) + past_bias[:, None, :, None]
    to_own = (rq.view(b, kv, r, group * length, dim) @ rk.transpose(-1, -2)).view(b, kv, r, group, length, length)
    shares = torch.cat([to_past, to_own + own_bias[:, None, :, None]], dim=-1).softmax(-1)
    of_past, of_own = shares.split([p, length], dim=-1)
    ahead = (of_past.reshape(b, kv, r * group * length, p) @ pv).view(b, kv, r, group * length, dim)
    ahead = ahead + of_own.reshape(b, kv, r, group * length, length) @ rv
    ahead = ahead.view(b, kv, r, group, length, dim).permute(0, 2, 4, 1, 3, 5).reshape(b * r * length, -1)
    return torch.cat([past, ahead])


def _rotated(heads: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of (N, heads, head_dim)."""
    cos, sin = rotary
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin
