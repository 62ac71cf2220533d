"""The parts that are trained beside the language model: the vision tower and the projector.

Sizes stand in `assemble.py`, which has to know them without this file. Knows nothing of scenes, questions or losses.
"""

import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from assets.demo_model.assemble import VISION


class Projector(nn.Module):
    """LLaVA's two-layer projector. (..., vision width) → (..., language width)."""

    def __init__(self, vision_size: int, text_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, text_size)
        self.linear_2 = nn.Linear(text_size, text_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(features)))


def build_tower() -> SiglipVisionModel:
    """A fresh SigLIP-type tower; its features are the last layer's, before the final norm."""
    config = SiglipVisionConfig(**VISION)
    config._attn_implementation = "eager"  # on a CPU the backward pass of the fused kernel takes longer than all the rest
    return SiglipVisionModel(config)


def tower_features(tower: SiglipVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    """(num_images, 3, side, side) uint8 → (num_images, num_patches, vision width).

    The same function as the model's own forward, with the patch convolution written as the matrix product that it is
    (its backward pass is ten times faster on a CPU).
    """
    patch, embeddings = VISION["patch_size"], tower.embeddings
    patches = pixels.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    values = patches.to(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32) / 127.5 - 1
    weight = embeddings.patch_embedding.weight.flatten(1)
    hidden = nn.functional.linear(values, weight, embeddings.patch_embedding.bias) + embeddings.position_embedding.weight
    return tower.encoder(inputs_embeds=hidden).last_hidden_state
