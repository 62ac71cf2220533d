"""The next token of each row, from its logits: penalties, bias, masks, temperature, top-k, top-p, min-p, and log-probabilities.

All rows in one batch, each as its own parameters say. A row's draw depends on its logits, its seed and how many tokens it has, and on
nothing else: not on the other rows, the step, or the device. Tensors in, tokens out; keeps no state.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.request import SampledToken, SamplingParams, TokenLogprobs

NUM_CANDIDATES = 64  # that top-k and top-p look at before all of the vocabulary is sorted
MASS_TOLERANCE = 1e-6  # of top_p: float32 sums of a few tokens may fall short by this much
MIN_TEMPERATURE = 1e-6  # lower ones would divide by float32's zero
_BLOCK = 256  # entries summed or compared at once
_TOP_BLOCK = 64
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What the sampler needs to know of one row of logits."""

    params: SamplingParams
    prompt_token_ids: Sequence[int]  # read for a repetition penalty only; order and repeats do not matter
    output_counts: Mapping[int, int]  # token id → times in the output
    num_output_tokens: int
    seed: int
    mask: np.ndarray | None = None  # of a grammar: (ceil(vocab_size / 32),) int32, bit i of word j allows token 32 j + i; None: all


def sample(logits: Tensor, rows: Sequence[SamplingRow], *, eos_token_ids: Sequence[int]) -> list[SampledToken]:
    """One token per row.

    logits: (num_rows, vocab_size) float32, any device, overwritten.
    A row in which nothing is left to choose gets the first end token (0 where there is none), so that it ends.
    """
    assert len(rows) == logits.shape[0], f"{len(rows)} rows for logits {tuple(logits.shape)}"
    asking = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
    raw = logits[asking] if asking else None
    is_changed = change(logits, rows, eos_token_ids)
    is_masked = _mask(logits, rows)
    chosen = _choose(logits, rows)
    if is_changed or is_masked:
        end = next((token_id for token_id in eos_token_ids if token_id < logits.shape[1]), 0)
        chosen = torch.where(logits.amax(-1) == -torch.inf, end, chosen)
    token_ids: list[int] = chosen.tolist()
    sampled = [SampledToken(token_id) for token_id in token_ids]
    if raw is not None:
        nums_top = [rows[index].params.logprobs or 0 for index in asking]
        for index, logprobs in zip(asking, token_logprobs(raw, chosen[asking], nums_top), strict=True):
            sampled[index] = SampledToken(token_ids[index], logprobs)
    return sampled


def uniform(seed: int, counter: int) -> float:
    """A number in [0, 1) that depends on both arguments alone."""
    return (hash64(seed, counter) >> 11) / (1 << 53)


def hash64(seed: int, counter: int) -> int:
    """64 bits that depend on both arguments alone (splitmix64)."""
    return _mix(_mix((seed & _MASK64) ^ _mix(counter)))


def _mix(number: int) -> int:
    """The splitmix64 step of Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014)."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK64
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK64
    return number ^ (number >> 31)


# Penalties, bias and masks: few entries per row, changed in place


@dataclass(frozen=True, slots=True)
class _Entry:
    """Some tokens of one row, with one number for all of them or one each."""

    row: int
    token_ids: Sequence[int] | np.ndarray
    values: float | Sequence[float]


def change(logits: Tensor, rows: Sequence[SamplingRow], eos_token_ids: Sequence[int]) -> bool:
    """Penalties, then bias, then masks, in place. False: no row has any."""
    repetitions, additions, biases, masked = [], [], [], []
    for index, row in enumerate(rows):
        params = row.params
        if params.repetition_penalty != 1:
            prompt, output = np.asarray(row.prompt_token_ids, np.int64), np.fromiter(row.output_counts, np.int64)
            repetitions.append(_Entry(index, np.concatenate((prompt, output)), params.repetition_penalty))
        if (params.presence_penalty or params.frequency_penalty) and row.output_counts:
            values = [-params.presence_penalty - params.frequency_penalty * count for count in row.output_counts.values()]
            additions.append(_Entry(index, list(row.output_counts), values))
        if params.logit_bias:
            biases.append(_Entry(index, list(params.logit_bias), list(params.logit_bias.values())))
        if token_ids := _masked_token_ids(row, eos_token_ids):
            masked.append(_Entry(index, token_ids, -torch.inf))
    if repetitions:
        places, penalties = _flatten(repetitions, logits)
        scores = logits[places]
        logits[places] = torch.where(scores < 0, scores * penalties, scores / penalties)
    for entries in (additions, biases, masked):
        if entries:
            places, amounts = _flatten(entries, logits)
            logits[places] += amounts
    return bool(repetitions or additions or biases or masked)


def _mask(logits: Tensor, rows: Sequence[SamplingRow]) -> bool:
    """What the rows' grammars forbid, in place. False: no row has any."""
    masks = [(index, row.mask) for index, row in enumerate(rows) if row.mask is not None]
    if not masks:
        return False
    words = np.stack([mask for _, mask in masks])
    is_allowed = np.unpackbits(words.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little").view(np.bool_)
    is_forbidden = torch.from_numpy(~is_allowed).to(logits.device)
    if len(masks) == len(rows):
        logits.masked_fill_(is_forbidden, -torch.inf)
    else:
        row_ids = torch.tensor([index for index, _ in masks], device=logits.device)
        logits[row_ids] = logits[row_ids].masked_fill_(is_forbidden, -torch.inf)
    return True


def _masked_token_ids(row: SamplingRow, eos_token_ids: Sequence[int]) -> Sequence[int]:
    if row.num_output_tokens < row.params.min_tokens:
        return list({*eos_token_ids, *row.params.stop_token_ids})
    return eos_token_ids if row.params.ignore_eos else ()


def _flatten(entries: Sequence[_Entry], logits: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Place (row, token id) and value of every entry, each (num_entries,), on the logits' device.

    Token ids beyond the vocabulary are left out.
    """
    lengths = [len(entry.token_ids) for entry in entries]
    row_ids = np.repeat([entry.row for entry in entries], lengths)
    token_ids = np.concatenate([np.asarray(entry.token_ids, np.int64) for entry in entries])
    values = np.concatenate([np.broadcast_to(np.asarray(entry.values, np.float32), len(entry.token_ids)) for entry in entries])
    is_known = (token_ids >= 0) & (token_ids < logits.shape[1])
    device = logits.device
    places = torch.from_numpy(row_ids[is_known]).to(device), torch.from_numpy(token_ids[is_known]).to(device)
    return places, torch.from_numpy(values[is_known]).to(device)


# Choosing


def _choose(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """(num_rows,) int64. Greedy rows take the best token, the first of equals."""
    groups: tuple[list[int], list[int], list[int]] = ([], [], [])
    for index, row in enumerate(rows):
        params = row.params
        groups[0 if params.temperature == 0 else 1 if params.top_k == 0 and params.top_p == 1 else 2].append(index)
    chosen = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for group, choose in zip(groups, (_choose_best, _choose_from_all, _choose_from_best), strict=True):
        if group:
            part = logits if len(group) == len(rows) else logits[group]
            chosen[group] = choose(part, [rows[index] for index in group])
    return chosen


def _choose_best(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    return _argmax(logits)


def _argmax(logits: Tensor) -> Tensor:
    """The first best entry of each row. By blocks on CPU, where torch's argmax takes 20 times as long as its amax."""
    num_rows, vocab_size = logits.shape
    block_size = math.gcd(vocab_size, _BLOCK)
    if logits.device.type != "cpu" or block_size < 16 or not logits.is_contiguous():
        return logits.argmax(-1)
    blocks = logits.view(num_rows, -1, block_size)
    block = blocks.amax(-1).argmax(-1)
    return block * block_size + blocks[torch.arange(num_rows), block].argmax(-1)


def _choose_from_all(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Rows without top-k and top-p: nothing has to be sorted."""
    weights = _scaled(logits, logits.amax(-1, keepdim=True), rows).exp_()
    if any(row.params.min_p for row in rows):
        weights *= weights >= _column([row.params.min_p for row in rows], weights)
    return _draw(weights, _uniforms(rows, logits))


def _choose_from_best(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Rows with top-k or top-p: looks at the best candidates; rows that may keep more of them are done again with the whole vocabulary."""
    best = logits.amax(-1, keepdim=True)
    scores, token_ids = _best(logits, NUM_CANDIDATES)
    weights = _scaled(scores, best, rows).exp_()
    totals = weights.new_full((len(rows), 1), torch.inf)
    if unlimited := [index for index, row in enumerate(rows) if not 0 < row.params.top_k < logits.shape[1]]:
        scaled = _scaled(logits[unlimited], best[unlimited], [rows[index] for index in unlimited])
        totals[unlimited] = scaled.exp_().sum(-1, keepdim=True)
    keeps = _keeps(weights, totals, rows)
    token_ids, order = token_ids.sort(-1)
    chosen = token_ids.gather(-1, _draw((weights * keeps).gather(-1, order), _uniforms(rows, logits))[:, None])[:, 0]
    if scores.shape[1] < logits.shape[1]:
        worst_kept = scores.gather(-1, keeps.sum(-1, keepdim=True) - 1)
        again = (worst_kept <= scores[:, -1:])[:, 0].nonzero()[:, 0].tolist()  # what comes after the candidates may be kept too
        for part in [[index] for index in again] if logits.device.type == "cpu" else [again] if again else []:
            chosen[part] = _choose_from_sorted(logits[part], best[part], [rows[index] for index in part])
    return chosen


def _choose_from_sorted(logits: Tensor, best: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """As `_choose_from_best`, over the whole vocabulary. Only values are sorted: a threshold, and how many of its equals stay."""
    weights = _scaled(logits, best, rows).exp_()
    in_order = _sorted(weights)
    num_kept = _keeps(in_order, weights.sum(-1, keepdim=True), rows).sum(-1, keepdim=True)
    threshold = in_order.gather(-1, num_kept - 1)
    is_above, is_equal = weights > threshold, weights == threshold
    num_equal = num_kept - is_above.sum(-1, keepdim=True)
    keeps = is_above | (is_equal & (is_equal.cumsum(-1) <= num_equal))
    return _draw(weights * keeps, _uniforms(rows, logits))


def _sorted(weights: Tensor) -> Tensor:
    """Each row's values, best first. numpy sorts floats with vector instructions, 50 times as fast as torch on CPU."""
    if weights.device.type != "cpu":
        return weights.sort(dim=-1, descending=True).values
    return torch.from_numpy(-np.sort(-weights.numpy(), -1))


def _best(logits: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """The best scores of each row and their token ids, best first, of equals the smaller token id first.

    Both (num_rows, num_candidates), or all of the vocabulary where it is smaller. Which of the last one's equals are there is left open.
    """
    if num_candidates >= logits.shape[1]:
        scores, token_ids = logits.sort(dim=-1, descending=True, stable=True)
        return scores, token_ids
    scores, token_ids = _best_blocks(logits, num_candidates)
    scores, order = scores.topk(num_candidates, -1)
    token_ids, by_id = token_ids.gather(-1, order).sort(-1)
    scores, order = scores.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    return scores, token_ids.gather(-1, order)


def _best_blocks(logits: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """Some scores and their token ids, among them the best: the blocks with the best maxima. Maxima are cheap, torch's topk is not."""
    num_rows, vocab_size = logits.shape
    all_ids = torch.arange(vocab_size, device=logits.device)
    if vocab_size % _TOP_BLOCK or vocab_size <= 2 * num_candidates * _TOP_BLOCK:
        return logits, all_ids.expand(num_rows, -1)
    blocks = logits.reshape(num_rows, -1, _TOP_BLOCK)
    chosen = blocks.amax(-1).topk(num_candidates, -1).indices
    row_ids = torch.arange(num_rows, device=logits.device)[:, None]
    return blocks[row_ids, chosen].flatten(1), all_ids.view(-1, _TOP_BLOCK)[chosen].flatten(1)


def _keeps(weights: Tensor, totals: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Which candidates each row keeps: (num_rows, num_candidates) bool, a run from the first on, at least one.

    weights: (num_rows, num_candidates), best first, the first is 1. totals: (num_rows, 1), what top_p is a share of, where top_k does not
    bound it by these candidates; infinite where they do not tell.
    """
    ranks = torch.arange(weights.shape[1], device=weights.device)
    top_k = torch.tensor([[row.params.top_k or weights.shape[1]] for row in rows], device=weights.device)
    keeps = ranks < top_k
    sums = (weights * keeps).cumsum(-1, dtype=torch.float64)
    totals = torch.where(top_k < weights.shape[1], sums[:, -1:], totals.double())
    top_p = torch.tensor([[row.params.top_p] for row in rows], dtype=torch.float64, device=weights.device)
    limits = torch.where(top_p < 1, top_p * totals * (1 - MASS_TOLERANCE), torch.inf)
    keeps &= sums - weights < limits
    keeps &= weights >= _column([row.params.min_p for row in rows], weights)
    keeps[:, 0] = True
    return keeps


def _scaled(logits: Tensor, best: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """(logits - best) / temperature: at most 0, so its exponential neither overflows nor is 0 everywhere, unless nothing is left."""
    scaled = logits - torch.where(best.isfinite(), best, 0)
    if all(row.params.temperature == 1 for row in rows):
        return scaled
    return scaled.div_(_column([max(row.params.temperature, MIN_TEMPERATURE) for row in rows], logits))


def _draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The entry of each row at which the running sum of its weights passes `uniforms` of the whole: (num_rows,) int64.

    In the order of the vocabulary, not of the weights, so that tiny differences in the logits move the bounds a little instead of
    exchanging neighbours. weights: (num_rows, num_entries), at least 0. Summed by blocks first, so that few entries are added one by one.
    """
    num_rows, num_entries = weights.shape
    if num_entries % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -num_entries % _BLOCK))
    blocks = weights.view(num_rows, -1, _BLOCK)
    block_sums = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    targets = uniforms[:, None] * block_sums[:, -1:]
    block = _first_above(block_sums, targets)
    before = torch.nn.functional.pad(block_sums, (1, 0)).gather(-1, block)
    row_ids = torch.arange(num_rows, device=weights.device)
    inner_sums = blocks[row_ids, block[:, 0]].cumsum(-1, dtype=torch.float64)
    entry = _first_above(inner_sums, targets - before)
    return (block * _BLOCK + entry)[:, 0].clamp_(max=num_entries - 1)


def _first_above(sums: Tensor, targets: Tensor) -> Tensor:
    """The first entry whose running sum is above the target, but never one after the last that adds anything: (num_rows, 1)."""
    return torch.minimum((sums <= targets).sum(-1, keepdim=True), (sums < sums[:, -1:]).sum(-1, keepdim=True))


def _uniforms(rows: Sequence[SamplingRow], logits: Tensor) -> Tensor:
    return torch.tensor([uniform(row.seed, row.num_output_tokens) for row in rows], dtype=torch.float64, device=logits.device)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


# Log-probabilities


def token_logprobs(logits: Tensor, chosen: Tensor, nums_top: Sequence[int]) -> list[TokenLogprobs]:
    """Of the chosen token of each row, and of its `nums_top` likeliest.

    logits: (num_rows, vocab_size) float32, the model's own; chosen: (num_rows,) int64.
    """
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, chosen[:, None])
    ranks = (logprobs > own).sum(-1) + 1
    scores, token_ids = _top(logprobs, max(nums_top))
    columns = (chosen.tolist(), own[:, 0].tolist(), ranks.tolist(), token_ids.tolist(), scores.tolist())
    return [
        TokenLogprobs(token_id, logprob, rank, tuple(zip(top_ids[:num_top], top_scores, strict=False)))
        for num_top, token_id, logprob, rank, top_ids, top_scores in zip(nums_top, *columns, strict=True)
    ]


def _top(logprobs: Tensor, num_top: int) -> tuple[Tensor, Tensor]:
    """The best log-probabilities and their token ids, both (num_rows, num_top); of equals those with the smaller token ids."""
    scores, token_ids = _best(logprobs, num_top + 1)
    for index in (scores[:, num_top - 1] == scores[:, -1]).nonzero()[:, 0].tolist() if 0 < num_top < logprobs.shape[1] else ():
        row_scores, row_token_ids = _best(logprobs[index : index + 1], logprobs.shape[1])
        scores[index], token_ids[index] = row_scores[0, : num_top + 1], row_token_ids[0, : num_top + 1]
    return scores[:, :num_top], token_ids[:, :num_top]
