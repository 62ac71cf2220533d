import pytest
import torch
from torch import nn
from transformers import AutoConfig

from tests.image_fixtures import (
    SIZES,
    copy_weights,
    encoder,
    encoder_inputs,
    picture,
    reference_features,
    reference_model,
    tiny_folder,
)
from tests.tiny_models import image_model_names
from vision.encoder import VisionEncoder

FAMILIES = image_model_names()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", FAMILIES)
def test_an_embedding_equals_the_references(name: str, size: tuple[int, int]) -> None:
    pixels = picture(size)

    (rows,) = encoder(name).encode([encoder_inputs(name, pixels)])

    torch.testing.assert_close(rows, reference_features(name, pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_of_one_batch_are_embedded_as_they_are_alone(name: str) -> None:
    pictures = [encoder_inputs(name, picture(size, seed)) for seed, size in enumerate([*SIZES.values(), (32, 32), (32, 32)])]
    batches: dict[tuple[object, ...], list[dict[str, torch.Tensor]]] = {}
    for arrays in pictures:
        batches.setdefault(encoder(name).batch_key(arrays), []).append(arrays)

    assert max(map(len, batches.values())) > 1
    for batch in batches.values():
        together = encoder(name).encode(batch)
        for arrays, rows in zip(batch, together, strict=True):
            torch.testing.assert_close(rows, encoder(name).encode([arrays])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_swapped_pictures_have_swapped_embeddings(name: str) -> None:
    first, second = (encoder_inputs(name, picture((32, 32), seed)) for seed in (1, 2))

    one, two = encoder(name).encode([first, second])
    swapped_one, swapped_two = encoder(name).encode([second, first])

    assert (one - two).abs().max() > 1e-2
    torch.testing.assert_close((swapped_two, swapped_one), (one, two), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_encoder_of_a_whole_model_equals_the_built_one(name: str) -> None:
    arrays = encoder_inputs(name, picture((40, 60)))

    whole = VisionEncoder.from_model(reference_model(name)).encode([arrays])[0]

    torch.testing.assert_close(whole, encoder(name).encode([arrays])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_encoder_holds_no_language_model(name: str) -> None:
    reference = dict(reference_model(name).named_parameters())

    names = dict(encoder(name).module.named_parameters())

    assert names.keys() < reference.keys()
    assert not [key for key in names if "language_model" in key or "text_model" in key or "lm_head" in key]
    left = [key for key in reference if key not in names]
    assert all("language_model" in key or "text_model" in key or "lm_head" in key for key in left)


@pytest.mark.parametrize("name", FAMILIES)
def test_buffers_that_no_checkpoint_holds_are_right(name: str) -> None:
    reference = dict(reference_model(name).named_buffers())

    for key, buffer in encoder(name).module.named_buffers():
        torch.testing.assert_close(buffer, reference[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_of_the_tower_is_run_once_and_in_order(name: str) -> None:
    order: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_, number=number: order.append(number)) for number, layer in enumerate(encoder(name).layers)
    ]

    encoder(name).encode([encoder_inputs(name, picture((32, 32)))])
    for hook in hooks:
        hook.remove()

    assert order == list(range(len(order)))
    assert len(order) == _num_layers(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_low_precision_embeddings_stay_near(name: str) -> None:
    arrays = encoder_inputs(name, picture((40, 60)))
    config = AutoConfig.from_pretrained(tiny_folder(name))

    low = VisionEncoder.build(config, dtype=torch.bfloat16, device="cpu", load=lambda module: copy_weights(name, module))
    rows = low.encode([arrays])[0]

    assert rows.dtype == torch.bfloat16
    expected = encoder(name).encode([arrays])[0]
    assert (rows.float() - expected).norm() / expected.norm() < 0.1


def test_a_parameter_that_is_not_loaded_is_named() -> None:
    def load_most(module: nn.Module) -> None:
        copy_weights("llava", module)
        module.get_parameter("model.multi_modal_projector.linear_2.bias").data[3] = torch.nan

    with pytest.raises(RuntimeError, match=r"multi_modal_projector\.linear_2\.bias"):
        VisionEncoder.build(AutoConfig.from_pretrained(tiny_folder("llava")), dtype=torch.float32, device="cpu", load=load_most)


def _num_layers(name: str) -> int:
    vision = AutoConfig.from_pretrained(tiny_folder(name)).vision_config
    return int(getattr(vision, "depth", None) or vision.num_hidden_layers)
