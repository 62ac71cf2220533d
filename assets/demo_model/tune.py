"""Stages 2 and 3: teach the language model to read image tokens, first those of the code, then those of the trained tower.

While the tower is still in its own training, the language model learns from codes made from the labels (`Codes`), with noise;
afterwards it gets used to what the tower says of rendered scenes (`Pictures`). The tower itself stays as stage 1 left it.
Loss on answers only; a few text chats with the original's own answers are mixed in.
"""

import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from assets.demo_model.batches import Batch, Packer
from assets.demo_model.codes import PatchCode
from assets.demo_model.labels import patch_labels, pixels_of
from assets.demo_model.language import PackedLanguageModel
from assets.demo_model.pretrain import Eye
from assets.demo_model.questions import TASKS
from assets.demo_model.scenes import Scene, sample_scene
from assets.demo_model.text_prompts import Exchange

SCENES_PER_STEP = 8
TEXTS_PER_STEP = 1
NOISE = 0.35
EVALUATION_SEED = 990_000_000


class ImageTokens(Protocol):
    """Where image tokens come from. Calls return (num_scenes, num_patches, hidden) float32."""

    def __call__(self, scenes: list[Scene], *, is_training: bool) -> torch.Tensor: ...


class Codes:
    """Image tokens made from the labels, with noise in training."""

    def __init__(self, code: PatchCode) -> None:
        self.code = code

    def __call__(self, scenes: list[Scene], *, is_training: bool) -> torch.Tensor:
        tokens = self.code(*_labels(scenes))
        noise = NOISE * self.code.norm / tokens.shape[-1] ** 0.5 if is_training else 0.0
        return tokens + noise * torch.randn_like(tokens)


class Pictures:
    """Image tokens of rendered scenes through the finished tower and projector."""

    def __init__(self, eye: Eye) -> None:
        self.eye = eye

    @torch.no_grad()
    def __call__(self, scenes: list[Scene], *, is_training: bool) -> torch.Tensor:
        return self.eye.projector(self.eye.features(torch.stack([pixels_of(scene) for scene in scenes])))


def _labels(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """The classes (num_scenes, num_patches, num_heads) and centres (num_scenes, num_patches, 2) of the patches."""
    labels = [patch_labels(scene) for scene in scenes]
    return torch.stack([label.classes for label in labels]), torch.stack([label.centre for label in labels])


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps and peak rate. The rate rises over `warm_up` steps, holds, and falls linearly over the last `decay` share of all steps."""

    num_steps: int
    peak: float
    warm_up: int = 30
    decay: float = 0.4

    def lasting(self, num_steps: int) -> "Schedule":
        return replace(self, num_steps=num_steps)

    def rate(self, step: int) -> float:
        return self.peak * min(1.0, (step + 1) / self.warm_up, (self.num_steps - step) / (self.decay * self.num_steps))


def hidden_and_targets(model: PackedLanguageModel, tokens: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states (num_answer_tokens, hidden) that predict the answer tokens, and those tokens."""
    prefix = model.embedding[batch.prefix_ids]
    prefix = prefix.masked_scatter(batch.is_image[..., None], tokens.to(prefix.dtype))
    hidden = model(prefix, model.embedding[batch.row_ids], batch.layout)
    return hidden[:, :, :-1][batch.is_answer[:, :, 1:]], batch.row_ids[batch.is_answer]


def tune(
    model: PackedLanguageModel,
    source: ImageTokens,
    packer: Packer,
    texts: list[Exchange],
    *,
    path: Path,
    schedule: Schedule,
    seed: int,
    save_every: int = 50,
) -> None:
    """Train the model's updates; resumes from `path`."""
    updates = list(model.updates.parameters())
    optimizer = torch.optim.AdamW(updates, lr=0.0, weight_decay=0.0, betas=(0.9, 0.98))
    first = _resume(path, model, optimizer)
    started = time.time()
    for step in range(first, schedule.num_steps):
        rng = random.Random(f"{seed} {step}")
        scenes = [sample_training_scene(rng) for _ in range(SCENES_PER_STEP)]
        batch = packer.pack(scenes, rng, texts=tuple(rng.sample(texts, TEXTS_PER_STEP)))
        hidden, targets = hidden_and_targets(model, source(scenes, is_training=True), batch)
        loss = nn.functional.cross_entropy((hidden @ model.embedding.T).float(), targets)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(updates, 1.0)
        optimizer.step()
        if (step + 1) % 10 == 0:
            print(f"step {step + 1} loss {loss.item():.4f} {(time.time() - started) / (step + 1 - first):.2f} s/step", flush=True)
        if (step + 1) % save_every == 0 or step + 1 == schedule.num_steps:
            _save(path, model, optimizer, step + 1)
            print(_line(right_shares(model, source, packer, num_batches=12)), flush=True)


def sample_training_scene(rng: random.Random) -> Scene:
    """A scene below the evaluation seeds; fewer single things than a picture has by chance, as they leave little to ask."""
    with_text = rng.random() < 0.2
    num_things = rng.choice((0, 1, 2)) if with_text else rng.choice((1, 1, 2, 3, 3, 4, 4))
    return sample_scene(rng.randrange(EVALUATION_SEED), num_things=num_things, with_text=with_text)


@torch.no_grad()
def right_shares(model: PackedLanguageModel, source: ImageTokens, packer: Packer, *, num_batches: int) -> dict[str, float]:
    """Share of whole answers right per task, in evaluation phrasings on held-out scenes of the first renderer.

    An answer counts when every token of the canonical one is the most likely after those before it: then greedy decoding writes it.
    """
    right = {task: [] for task in TASKS}
    for i in range(num_batches):
        rng = random.Random(i)
        scenes = [sample_scene(EVALUATION_SEED + i * SCENES_PER_STEP + j) for j in range(SCENES_PER_STEP)]
        batch = packer.pack(scenes, rng, is_evaluation=True)
        hidden, targets = hidden_and_targets(model, source(scenes, is_training=False), batch)
        is_hit = (hidden @ model.embedding.T).argmax(-1) == targets
        turns = batch.turn_ids[batch.is_answer]
        for turn, task in enumerate(batch.tasks):
            right[task].append(is_hit[turns == turn].all().item())
    return {task: sum(hits) / max(len(hits), 1) for task, hits in right.items()}


@torch.no_grad()
def text_perplexity(model: PackedLanguageModel, packer: Packer, held_out: list[Exchange]) -> float:
    """Perplexity of the original's answers to held-out text prompts."""
    total, num_tokens = 0.0, 0
    for i in range(0, len(held_out), SCENES_PER_STEP):
        texts = tuple(held_out[i : i + SCENES_PER_STEP])
        batch = packer.pack([sample_scene(0, num_things=1)] * len(texts), random.Random(0), texts=texts)
        is_text = batch.is_answer & (batch.turn_ids < 0)
        hidden = model(model.embedding[batch.prefix_ids], model.embedding[batch.row_ids], batch.layout)
        logits = (hidden[:, :, :-1][is_text[:, :, 1:]] @ model.embedding.T).float()
        total += nn.functional.cross_entropy(logits, batch.row_ids[is_text], reduction="sum").item()
        num_tokens += len(logits)
    return math.exp(total / num_tokens)


def load_updates(path: Path, model: PackedLanguageModel) -> None:
    """Fill the model's updates from a checkpoint of any stage."""
    model.updates.load_state_dict(torch.load(path)["updates"])


def _line(shares: dict[str, float]) -> str:
    return "right: " + " ".join(f"{task} {share:.3f}" for task, share in shares.items())


def _save(path: Path, model: PackedLanguageModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    torch.save({"updates": model.updates.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def _resume(path: Path, model: PackedLanguageModel, optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    load_updates(path, model)
    state = torch.load(path)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
