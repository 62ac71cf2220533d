"""A vision tower's forward over a part of its tiles at a time: no operator is longer than one part takes, and less memory is used.

Tiles do not see each other in a tower, so the parts' results, one after the other, are those of all tiles. Towers that take patches
of any number in one sequence (Qwen's) stay as they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_TOWERS = ("vision_tower", "vision_model")


def compute_in_parts(module: nn.Module, *, max_pixels: int) -> None:
    """From now on the towers within `module` take at most `max_pixels` of pictures at a time, or one tile."""
    for owner in list(module.modules()):
        for name in _TOWERS:
            tower = owner._modules.get(name)
            if isinstance(tower, nn.Module) and not _is_within_tower(module, owner):
                _take_parts(tower, max_pixels)


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
