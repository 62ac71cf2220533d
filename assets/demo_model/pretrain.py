"""Stage 1: teach the vision tower to see, by per-patch labels, and the projector to say what it sees in the code of `codes.py`.

The heads that read the labels off the features are thrown away afterwards. Knows nothing of the language model beyond that code.
"""

import random
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from assets.demo_model.architecture import Projector, build_tower, tower_features
from assets.demo_model.assemble import VISION
from assets.demo_model.codes import PatchCode
from assets.demo_model.labels import HEADS, patch_labels, pixels_of
from assets.demo_model.scenes import sample_printed_scene, sample_scene

BATCH = 64

# Each batch is used twice, the second time some batches later: drawing scenes costs as much as learning from them.
ECHOES = 2
ECHO_BUFFER = 16
LEARNING_RATE = 1.5e-3

# What is learned last counts more.
WEIGHTS = {"shape": 3.0, "character": 5.0, "rank": 0.5, "count": 0.5}

# Pixels, classes and centres of the scenes of one step.
Batch = list[torch.Tensor]


class LabelledScenes(Dataset):
    """Scene number i of a seed: pixels, classes, centres. Half are pages of text, a quarter hold things and one text."""

    def __init__(self, seed: int, num_scenes: int, first: int = 0) -> None:
        self.seed, self.num_scenes, self.first = seed, num_scenes, first

    def __len__(self) -> int:
        return self.num_scenes - self.first

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        i += self.first
        scene = sample_printed_scene(self.seed + i) if i % 2 else sample_scene(self.seed + i, with_text=i % 4 == 0)
        labels = patch_labels(scene)
        return pixels_of(scene), labels.classes, labels.centre


class Eye(nn.Module):
    """All that this stage trains: the tower, the projector, and the heads, which no one needs afterwards."""

    def __init__(self, text_size: int) -> None:
        super().__init__()
        self.tower = build_tower()
        self.projector = Projector(VISION["hidden_size"], text_size)
        self.heads = nn.Linear(VISION["hidden_size"], sum(HEADS.values()) + 2)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """(num_images, 3, side, side) uint8 → (num_images, num_patches, width) float32; bfloat16 inside while training."""
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.is_grad_enabled()):
            return tower_features(self.tower, pixels).float()

    def read(self, features: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The heads' logits by name, each (..., num_classes), and the centres (..., 2)."""
        *logits, centre = self.heads(features).split([*HEADS.values(), 2], dim=-1)
        return dict(zip(HEADS, logits, strict=True)), centre

    def loss(
        self, features: torch.Tensor, tokens: torch.Tensor, classes: torch.Tensor, centre: torch.Tensor, code: PatchCode
    ) -> torch.Tensor:
        """Cross entropy of all heads where they apply, the distance of the centres, and of the image tokens from the code."""
        logits, guess = self.read(features)
        marked = classes[..., 0] > 0
        total = 5 * (guess[marked] - centre[marked]).abs().mean()
        for i, name in enumerate(HEADS):
            applies = classes[..., i] >= 0
            if applies.any():
                total = total + WEIGHTS.get(name, 1.0) * nn.functional.cross_entropy(logits[name][applies], classes[..., i][applies])
        distance = ((tokens - code(classes, centre)) / code.norm).square().sum(-1)
        return total + distance[marked].mean() + distance[~marked].mean()


@torch.no_grad()
def accuracies(eye: Eye, code: PatchCode, seed: int, num_scenes: int = 256) -> dict[str, float]:
    """Share of right patches per head where it applies, on scenes of another seed; `kind` only where something is.

    `code_error` is the squared distance of the marked patches' tokens from the code, as a share of its squared length.
    """
    scenes = LabelledScenes(seed, num_scenes)
    pixels, classes, centre = (torch.stack(part) for part in zip(*(scenes[i] for i in range(num_scenes)), strict=True))
    features = eye.features(pixels)
    logits, guess = eye.read(features)
    result = {}
    for i, name in enumerate(HEADS):
        applies = classes[..., i] > (0 if name == "kind" else -1)
        result[name] = (logits[name].argmax(-1) == classes[..., i])[applies].float().mean().item()
    marked = classes[..., 0] > 0
    result["empty"] = (logits["kind"].argmax(-1) == 0)[~marked].float().mean().item()
    result["centre_error"] = (guess - centre)[marked].abs().mean().item()
    target = code(classes, centre)[marked]
    result["code_error"] = ((eye.projector(features)[marked] - target).square().sum() / target.square().sum()).item()
    return result


def pretrain(eye: Eye, folder: Path, code: PatchCode, *, seed: int, num_steps: int, log_every: int = 100) -> None:
    """Train for `num_steps`; resumes from `folder/eye.pt`, which is written every few minutes."""
    optimizer = torch.optim.AdamW(eye.parameters(), lr=LEARNING_RATE, weight_decay=0.02, betas=(0.9, 0.98))
    first = _resume(folder / "eye.pt", eye, optimizer)
    scenes = LabelledScenes(seed * 10_000_000, num_steps * BATCH // ECHOES, first * BATCH // ECHOES)
    started = time.time()
    batches = _echoed(DataLoader(scenes, BATCH, num_workers=1, prefetch_factor=4), random.Random(f"{seed} {first}"))
    for step, (pixels, classes, centre) in enumerate(batches, start=first):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps)
        features = eye.features(pixels)
        loss = eye.loss(features, eye.projector(features), classes, centre, code)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(eye.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % log_every == 0:
            print(f"step {step + 1} loss {loss.item():.3f} {(time.time() - started) / (step + 1 - first):.3f} s/step", flush=True)
        if (step + 1) % (2 * log_every) == 0 or step + 1 == num_steps:
            figures = accuracies(eye, code, seed=999_000_000)
            print(" ".join(f"{name} {value:.3f}" for name, value in figures.items()), flush=True)
            _save(folder / "eye.pt", eye, optimizer, step + 1)


def _echoed(batches: Iterable[Batch], rng: random.Random) -> Iterator[Batch]:
    """Each batch, followed by one of the last few."""
    recent: deque[Batch] = deque(maxlen=ECHO_BUFFER)
    for batch in batches:
        recent.append(batch)
        yield batch
        yield rng.choice(recent)


def learning_rate(step: int, num_steps: int) -> float:
    """Linear warm-up over 200 steps, then a cosine to zero."""
    return LEARNING_RATE * min(1.0, (step + 1) / 200) * (0.5 + 0.5 * float(np.cos(np.pi * step / num_steps)))


def _save(path: Path, eye: Eye, optimizer: torch.optim.Optimizer, step: int) -> None:
    torch.save({"eye": eye.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def _resume(path: Path, eye: Eye, optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    state = torch.load(path)
    eye.load_state_dict(state["eye"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
