import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.layers.linear import Source
from engine.models.registry import UnsupportedModelError, load_config
from engine.models.weights import SafetensorsCheckpoint, canonical, check_names, fill_module, open_checkpoint
from tests.tiny_models import write_tiny
from vision.encoder import VisionEncoder


@pytest.mark.parametrize(
    ("stored", "ours"),
    [
        ("model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("model.text_model.norm.weight", "norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "vision_tower.encoder.layers.0.mlp.fc1.weight"),
        ("model.visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight"),
    ],
)
def test_names_of_old_and_new_layouts_become_one(stored, ours):
    assert canonical(stored) == ours


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_checkpoints_under_their_published_names_fill_the_tower(name, tmp_path):
    folder = write_tiny(name, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    published = {_published_name(key): tensor for key, tensor in tensors.items()}
    assert any(key.startswith("vision_tower.vision_model.") for key in published)
    save_file(published, folder / "model.safetensors", {"format": "pt"})

    encoder = _build_encoder(folder)

    ours = {canonical(key): tensor for key, tensor in tensors.items()}
    for key, parameter in encoder.module.named_parameters():
        assert torch.equal(parameter, ours[canonical(key)])


def test_a_missing_tensor_is_named(tmp_path):
    folder = write_tiny("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(UnsupportedModelError, match=r"norm\.weight"):
        check_names([Source("norm.weight", torch.empty(64), slice(None), None)], SafetensorsCheckpoint(folder))


def test_shards_with_an_index_read_as_one_file_does(tmp_path):
    folder = write_tiny("llama", tmp_path)
    whole = load_file(folder / "model.safetensors")
    names = sorted(whole)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: whole[name] for name in part}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    checkpoint = SafetensorsCheckpoint(folder)

    for name in names:
        assert torch.equal(checkpoint.read(canonical(name), slice(None), None), whole[name])


def test_a_folder_without_safetensors_says_what_to_do(tmp_path):
    with pytest.raises(UnsupportedModelError, match="convert the checkpoint"):
        SafetensorsCheckpoint(tmp_path)


def test_dummy_weights_are_the_same_for_the_same_seed(tmp_path):
    folder = write_tiny("llama", tmp_path)
    config = load_config(str(folder))

    def up_proj(seed: int) -> torch.Tensor:
        checkpoint = open_checkpoint(str(folder), config, load_format="dummy", dtype=torch.float32, seed=seed)
        return checkpoint.read("layers.0.mlp.up_proj.weight", slice(0, 4), slice(2, 5))

    first, again, other = up_proj(1), up_proj(1), up_proj(2)

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (4, 3)


def _published_name(key: str) -> str:
    """As the first releases of these families named it on the hub."""
    key = canonical(key)
    if key.startswith("vision_tower."):
        return key.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if key.startswith(("multi_modal_projector.", "image_newline")):
        return key
    return f"language_model.{key}" if key.startswith("lm_head") else f"language_model.model.{key}"


def _build_encoder(folder: Path) -> VisionEncoder:
    config = load_config(str(folder))
    checkpoint = open_checkpoint(str(folder), config, load_format="auto", dtype=torch.float32, seed=0)
    return VisionEncoder.build(config, dtype=torch.float32, device="cpu", load=functools.partial(fill_module, checkpoint=checkpoint))
