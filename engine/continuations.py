"""What beams may go on with: the best next tokens of each row, or a draw of them without replacement.

Scores are processed as transformers does for beams: log-probabilities first, then penalties, bias and masks, then temperature and the like.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.beams import Continuation
from engine.sampler import SamplingRow, change, hash64


def continuations(logits: Tensor, row: SamplingRow, *, eos_token_ids: Sequence[int], num_kept: int, min_kept: int) -> list[Continuation]:
    """The `num_kept` best tokens of one row, or a draw of as many where its temperature is above 0. Fewer where others are impossible.

    logits: (vocab_size,) float32. min_kept: tokens that top_k, top_p and min_p leave at least.
    """
    scores = logits.log_softmax(-1)[None]
    change(scores, [row], eos_token_ids)
    scores = scores[0]
    keys = scores
    if row.params.temperature > 0:
        scores = _warp(scores / row.params.temperature, row, min_kept)
        keys = scores + _gumbel(row, scores)
    keys, token_ids = keys.topk(min(num_kept, len(keys)))
    chosen = scores[token_ids]
    triples = zip(token_ids.tolist(), chosen.tolist(), (keys - chosen).tolist(), strict=True)
    return [Continuation(token_id, score, noise) for token_id, score, noise in triples if score > -torch.inf]


def _warp(scores: Tensor, row: SamplingRow, min_kept: int) -> Tensor:
    """scores: (vocab_size,), those that top_k, top_p and min_p drop set to -inf."""
    params = row.params
    if not (0 < params.top_k < len(scores) or params.top_p < 1 or params.min_p):
        return scores
    in_order, token_ids = scores.sort(descending=True)
    if 0 < params.top_k < len(scores):
        in_order[max(params.top_k, min_kept) :] = -torch.inf
    if params.top_p < 1:
        weights = in_order.softmax(-1)
        in_order[min_kept:].masked_fill_((weights.cumsum(-1) - weights >= params.top_p)[min_kept:], -torch.inf)
    if params.min_p:
        weights = in_order.softmax(-1)
        in_order[min_kept:].masked_fill_((weights < params.min_p * weights[0])[min_kept:], -torch.inf)
    return torch.empty_like(scores).scatter_(0, token_ids, in_order)


def _gumbel(row: SamplingRow, like: Tensor) -> Tensor:
    """Noise that makes the largest sums a draw without replacement (Kool et al., "Stochastic beams and where to find them", 2019)."""
    generator = torch.Generator().manual_seed(hash64(row.seed, row.num_output_tokens) >> 1)
    uniforms = torch.rand(len(like), generator=generator, dtype=torch.float64).clamp_min_(1e-300)
    return (-(-uniforms.log()).log()).to(like.device, like.dtype)
