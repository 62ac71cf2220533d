import numpy as np
import pytest
import torch

from tests.image_fixtures import SIZES, encoder_inputs, picture, preprocessor, reference_inputs, tiny_folder
from tests.tiny_models import image_model_names
from vision.families import MEAN_AND_STD, normalize
from vision.image import ImageOptions
from vision.processor import ImagePreprocessor

FAMILIES = image_model_names()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_normalised_later_equal_the_references_bit_for_bit(name: str, size: tuple[int, int]) -> None:
    pixels = picture(size)

    arrays = encoder_inputs(name, pixels)

    assert arrays["pixel_values"].dtype == torch.uint8
    expected = reference_inputs(name, [pixels])["pixel_values"]
    ours = normalize(arrays["pixel_values"], arrays[MEAN_AND_STD])
    assert torch.equal(ours.reshape(-1), _without_repeated_frames(name, expected).reshape(-1))


def _without_repeated_frames(name: str, pixel_values: torch.Tensor) -> torch.Tensor:
    """A still picture is its own next frame for the video towers; ours travels once."""
    if not name.startswith("qwen"):
        return pixel_values
    frames = pixel_values.view(pixel_values.shape[0], 3, 2, -1)
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])
    return frames[:, :, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_processor_whose_pixels_cannot_wait_gives_them_normalised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vision.processor.normalize", lambda pixels, mean_and_std: pixels.float())  # so it never equals the reference
    pixels = picture((40, 60))

    slow = ImagePreprocessor(str(tiny_folder(name)))
    arrays, layout, num_tokens = slow.process(pixels, ImageOptions())

    raw, raw_layout, raw_num_tokens = preprocessor(name).process(pixels, ImageOptions())
    assert arrays["pixel_values"].dtype == np.float32
    assert MEAN_AND_STD not in arrays
    assert (layout, num_tokens) == (raw_layout, raw_num_tokens)
    assert slow.fingerprint != preprocessor(name).fingerprint
    expected = normalize(torch.from_numpy(raw["pixel_values"]), torch.from_numpy(raw[MEAN_AND_STD]))
    assert np.array_equal(arrays["pixel_values"], expected.numpy())


@pytest.mark.parametrize("name", FAMILIES)
def test_layouts_hold_plain_numbers(name: str) -> None:
    _, layout, num_tokens = preprocessor(name).process(picture((90, 150)), ImageOptions())

    assert {type(value) for value in layout.values()} == {int}
    assert type(num_tokens) is int


def test_the_same_settings_have_the_same_fingerprint_and_others_another() -> None:
    fingerprints = [preprocessor(name).fingerprint for name in FAMILIES]

    assert ImagePreprocessor(str(tiny_folder("llava"))).fingerprint == preprocessor("llava").fingerprint
    assert len(set(fingerprints)) == len(FAMILIES)


def test_a_pixel_budget_shrinks_and_widens_the_picture() -> None:
    auto, *others = (
        preprocessor("llava").process(picture((60, 90)), options)[0]["pixel_values"]
        for options in (ImageOptions(), ImageOptions(max_pixels=300), ImageOptions(min_pixels=60_000), ImageOptions(detail="high"))
    )

    assert [bool(np.array_equal(auto, other)) for other in others] == [False, False, True]


def test_low_detail_leaves_small_pictures_alone() -> None:
    low, auto = (preprocessor("llava").process(picture((60, 90)), ImageOptions(detail=detail))[0] for detail in ("low", "auto"))

    assert np.array_equal(low["pixel_values"], auto["pixel_values"])


BUDGETS = {
    "plain": ImageOptions(),
    "low": ImageOptions(detail="low"),
    "few": ImageOptions(max_pixels=900),
    "many": ImageOptions(min_pixels=90_000),
}


@pytest.mark.parametrize("options", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("size", [*SIZES.values(), (700, 1300)], ids=[*SIZES, "over the low budget"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_size_alone_tells_the_layout(name: str, size: tuple[int, int], options: ImageOptions) -> None:
    _, layout, num_tokens = preprocessor(name).process(picture(size), options)

    assert preprocessor(name).measure(size, options) == (layout, num_tokens)
