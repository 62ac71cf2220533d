"""The first stage of the recipe, a few steps of it: the seed decides everything, and the loss names what is wrong."""

from pathlib import Path

import pytest
import torch

from assets.demo_model import pretrain as stage
from assets.demo_model.assemble import build_tokenizer
from assets.demo_model.codes import PatchCode
from assets.demo_model.pretrain import Eye, accuracies, pretrain
from assets.demo_model.train import find_gguf

NUM_STEPS = 4


@pytest.fixture(scope="module")
def code() -> PatchCode:
    tokenizer = build_tokenizer(find_gguf())
    return PatchCode(torch.randn(tokenizer.get_vocab_size(), 48, generator=torch.Generator().manual_seed(0)), tokenizer)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "BATCH", 4)


def trained(code: PatchCode, folder: Path, seed: int, num_steps: int = NUM_STEPS) -> Eye:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    eye = Eye(code.width)
    pretrain(eye, folder, code, seed=seed, num_steps=num_steps)
    return eye


def equal(eye: Eye, other: Eye) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in eye.state_dict().items())


def test_the_seed_decides_the_weights(code: PatchCode, tmp_path: Path) -> None:
    first, again, other = trained(code, tmp_path / "first", 5), trained(code, tmp_path / "again", 5), trained(code, tmp_path / "other", 6)

    assert equal(first, again)
    assert not equal(first, other)


def test_a_finished_stage_is_taken_from_its_checkpoint(code: PatchCode, tmp_path: Path) -> None:
    first = trained(code, tmp_path, 5)

    assert equal(first, trained(code, tmp_path, 5))


def test_an_eye_that_knows_nothing_is_measured_as_such(code: PatchCode) -> None:
    torch.manual_seed(0)

    figures = accuracies(Eye(code.width), code, seed=1, num_scenes=8)

    assert figures["character"] < 0.3
    assert figures["code_error"] > 0.5
