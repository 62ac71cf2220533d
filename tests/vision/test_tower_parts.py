import functools

import pytest
import torch
from transformers import AutoConfig

from tests.image_fixtures import copy_weights, encoder, encoder_inputs, picture, tiny_folder
from tests.tiny_models import image_model_names
from vision.encoder import VisionEncoder
from vision.tower_parts import Part, compute_in_parts, layers_in_parts

TILE_PIXELS = 32 * 32  # of the tiny families
TILED = ("llava_next", "idefics3", "smolvlm")


def encoder_in_parts(name: str, max_pixels: int) -> VisionEncoder:
    config = AutoConfig.from_pretrained(tiny_folder(name))
    built = VisionEncoder.build(config, dtype=torch.float32, device="cpu", load=functools.partial(copy_weights, name))
    compute_in_parts(built.module, max_pixels=max_pixels)
    return built


@pytest.mark.parametrize("num_tiles", [1, 3])
@pytest.mark.parametrize("name", image_model_names())
def test_embeddings_computed_in_parts_equal_those_computed_at_once(name: str, num_tiles: int) -> None:
    batch = [encoder_inputs(name, picture((90, 150), seed)) for seed in range(3)]

    in_parts = encoder_in_parts(name, num_tiles * TILE_PIXELS).encode(batch)

    for rows, expected in zip(in_parts, encoder(name).encode(batch), strict=True):
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TILED)
def test_no_part_has_more_tiles_than_it_may(name: str) -> None:
    built = encoder_in_parts(name, 2 * TILE_PIXELS)
    seen: list[int] = []
    built.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(len(inputs[0])))
    arrays = encoder_inputs(name, picture((90, 150)))

    built.encode([arrays])

    num_tiles = len(arrays["pixel_values"])
    assert num_tiles > 2
    assert seen == [2] * (num_tiles // 2) + [1] * (num_tiles % 2)


@pytest.mark.parametrize("max_rows", [1, 5, 10_000])
@pytest.mark.parametrize("name", image_model_names())
def test_layers_computed_in_parts_give_the_same_embeddings(name: str, max_rows: int) -> None:
    built = encoder_in_parts(name, 10**9)
    batch = [encoder_inputs(name, picture((90, 150), seed)) for seed in range(2)]
    layers_in_parts(built.layers, max_rows=max_rows)

    in_parts = built.encode(batch)

    for rows, expected in zip(in_parts, encoder(name).encode(batch), strict=True):
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", image_model_names())
def test_no_operator_of_a_layer_takes_more_rows_than_it_may(name: str) -> None:
    built = encoder_in_parts(name, 10**9)
    layers_in_parts(built.layers, max_rows=7)
    sizes: dict[str, list[int]] = {"linear": [], "attention": []}
    for owner in built.layers[0].modules():
        for part in (child for child in owner.children() if isinstance(child, Part)):
            kind = "linear" if isinstance(owner, torch.nn.Linear) else "attention"
            part.register_forward_hook(lambda _, inputs, output, kind=kind: sizes[kind].append(output.shape[-2]))

    built.encode([encoder_inputs(name, picture((90, 150)))])

    assert max(sizes["linear"]) == max(sizes["attention"]) == 7
    assert len(sizes["linear"]) > len(sizes["attention"]) > 1
