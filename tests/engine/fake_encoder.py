"""A vision encoder of plain layers, which counts how far it has come."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from engine.request import ImageInput
from vision.shared_array import SharedArray

HIDDEN_SIZE = 8
NUM_TOKENS = 4


class FakeEncoder:
    """Each picture becomes NUM_TOKENS equal rows of its first pixel."""

    def __init__(self, num_layers: int = 5) -> None:
        self.layers = [nn.Identity() for _ in range(num_layers)]
        self.num_layers_done = 0
        self.batch_sizes: list[int] = []
        self.failure: Exception | None = None

    def batch_key(self, arrays: Mapping[str, SharedArray]) -> tuple[object, ...]:
        return arrays["pixel_values"].shape

    def encode(self, batch: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        self.batch_sizes.append(len(batch))
        for layer in self.layers:
            layer(torch.zeros(1))
            self.num_layers_done += 1
        if self.failure:
            raise self.failure
        return [arrays["pixel_values"].flatten()[0].float().expand(NUM_TOKENS, HIDDEN_SIZE) for arrays in batch]


class SteppingClock:
    """Each reading is a second after the one before: every layer of the fake encoder takes one."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def fake_image(value: int, *, side: int = 2, num_tokens: int = NUM_TOKENS) -> ImageInput:
    pixels = np.full((1, 3, side, side), value, dtype=np.uint8)
    return ImageInput(bytes([value, side]), num_tokens, {"pixel_values": SharedArray.copy_of(pixels)})
