"""A vision tower's forward in parts: over some of its tiles at a time, and each layer's operators over some of their rows.

So no operator takes long, whatever the picture's size, and less memory is used. Tiles do not see each other in a tower, nor do the rows of
a linear layer or the queries of an attention, so the parts' results, one after the other, are those of the whole. Towers that take patches
of any number in one sequence (Qwen's) have no tiles.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_TOWERS = ("vision_tower", "vision_model")
_ATTENTION = "sdpa_in_parts"


def compute_in_parts(module: nn.Module, *, max_pixels: int) -> None:
    """From now on the towers within `module` take at most `max_pixels` of pictures at a time, or one tile."""
    for owner in list(module.modules()):
        for name in _TOWERS:
            tower = owner._modules.get(name)
            if isinstance(tower, nn.Module) and not _is_within_tower(module, owner):
                _take_parts(tower, max_pixels)


class Part(nn.Identity):
    """Begins each part of an operator's rows: a place for hooks between two of them."""

    def __init__(self, max_rows: int) -> None:
        super().__init__()
        self.max_rows = max_rows


def layers_in_parts(layers: Iterable[nn.Module], *, max_rows: int) -> None:
    """From now on the linear layers and attentions within `layers` take at most so many rows at a time; each has a `Part`."""
    for module in [module for layer in layers for module in layer.modules()]:
        if type(module) is nn.Linear:
            module.add_module("part", part := Part(max_rows))
            module.forward = partial(_linear_in_parts, module.forward, part)  # type: ignore[method-assign]
        elif isinstance(config := getattr(module, "config", None), PreTrainedConfig) and config._attn_implementation in (
            "sdpa",
            _ATTENTION,
        ):
            module.add_module("part", Part(max_rows))
            config._attn_implementation = _ATTENTION


def _linear_in_parts(whole: Callable[[Tensor], Tensor], part: Part, rows: Tensor) -> Tensor:
    """rows: (..., in_features)."""
    if rows.shape[:-1].numel() <= part.max_rows:
        return whole(part(rows))
    results = [whole(part(some)) for some in torch.split(rows.reshape(-1, rows.shape[-1]), part.max_rows)]
    return torch.cat(results).view(*rows.shape[:-1], -1)


def _attention_in_parts(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """query: (batch, heads, rows, head_size); attention_mask: (…, rows or 1, columns). Gives (batch, rows, heads, head_size)."""
    part = module._modules.get("part")
    num_rows, is_causal = query.shape[2], kwargs.get("is_causal", getattr(module, "is_causal", True))

    def attend(some: Tensor, mask: Tensor | None) -> Tensor:
        output: Tensor = sdpa_attention_forward(module, some, key, value, mask, **kwargs)[0]  # type: ignore[no-untyped-call]
        return output

    if not isinstance(part, Part) or num_rows <= part.max_rows or is_causal:
        return attend(query, attention_mask), None
    queries = torch.split(query, part.max_rows, dim=2)
    masks: Sequence[Tensor | None] = [attention_mask] * len(queries)
    if attention_mask is not None and attention_mask.shape[-2] == num_rows:
        masks = torch.split(attention_mask, part.max_rows, dim=-2)
    return torch.cat([attend(part(some), mask) for some, mask in zip(queries, masks, strict=True)], dim=1), None


AttentionInterface.register(_ATTENTION, _attention_in_parts)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def _is_within_tower(module: nn.Module, owner: nn.Module) -> bool:
    """Some towers hold their inner model under the same name: `vision_tower.vision_model`."""
    path = next(path for path, child in module.named_modules() if child is owner)
    return any(part in _TOWERS for part in path.split("."))


def _take_parts(tower: nn.Module, max_pixels: int) -> None:
    whole = tower.forward

    def forward(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """pixel_values: (num_tiles, 3, height, width). Other tensors with num_tiles rows are split with them."""
        num_tiles, _, height, width = pixel_values.shape
        size = max(1, max_pixels // (height * width))
        if num_tiles <= size:
            return whole(pixel_values, *args, **kwargs)

        def part(value: Any, start: int) -> Any:
            return value[start : start + size] if isinstance(value, Tensor) and value.shape[:1] == (num_tiles,) else value

        return _joined(
            [
                whole(
                    part(pixel_values, start),
                    *(part(value, start) for value in args),
                    **{name: part(value, start) for name, value in kwargs.items()},
                )
                for start in range(0, num_tiles, size)
            ]
        )

    tower.forward = forward


def _joined(parts: Sequence[Any]) -> Any:
    """One output of the towers' kind, of tensors, of tuples of them, and of None."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, dict):
        return type(first)(**{name: _joined([part[name] for part in parts]) for name in first})
    if isinstance(first, tuple):
        return tuple(_joined(values) for values in zip(*parts, strict=True))
    assert first is None, f"a tower's output holds {type(first)}"
    return None
