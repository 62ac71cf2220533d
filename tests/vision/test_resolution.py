"""Resolution, family by family: equal to the reference's own processor on the picture and with the settings that are written out here."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from tests.image_fixtures import encoder, picture, preprocessor, reference_model, reference_processor, tiny_folder
from tests.tiny_models import image_model_names
from vision.families import MEAN_AND_STD, load_family, normalize
from vision.image import ImageOptions
from vision.processor import MAX_ELEMENTS, ImagePreprocessor
from vision.resolution import LEAST_BUDGET_PIXELS, LOW_DETAIL_PIXELS, fitted_size

FAMILIES = image_model_names()
SIZE = (300, 700)  # height, width
LARGE = (700, 1300)


@dataclass(frozen=True)
class Case:
    """What a request says, and what the reference is given for it: a size that the picture is resized to first, and settings."""

    name: str
    options: ImageOptions
    size: tuple[int, int] = SIZE
    resized: tuple[int, int] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} {self.options}"


def shrunk(size: tuple[int, int], num_pixels: int) -> tuple[int, int]:
    scale = math.sqrt(num_pixels / (size[0] * size[1]))
    return math.floor(size[0] * scale), math.floor(size[1] * scale)


def grown(size: tuple[int, int], num_pixels: int) -> tuple[int, int]:
    scale = math.sqrt(num_pixels / (size[0] * size[1]))
    return math.ceil(size[0] * scale), math.ceil(size[1] * scale)


def area(least: int, most: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": least, "longest_edge": most}}


def edge(longest: int) -> dict[str, Any]:
    return {"size": {"longest_edge": longest}}


RATIO = 700 / 300
WHOLE = {"do_image_splitting": False}
CASES = [
    *(Case(name, ImageOptions(detail="auto")) for name in FAMILIES),
    *(Case(name, ImageOptions(detail="high")) for name in FAMILIES if name != "gemma3"),
    # One size, or tiles of one size: the picture itself is made smaller or larger.
    *(Case(name, ImageOptions(max_pixels=5000), resized=shrunk(SIZE, 5000)) for name in ("llava", "llava_next", "gemma3")),
    *(Case(name, ImageOptions(min_pixels=400_000), resized=grown(SIZE, 400_000)) for name in ("llava", "llava_next", "gemma3")),
    *(Case(name, ImageOptions(detail="low"), LARGE, shrunk(LARGE, 512 * 512)) for name in ("llava", "gemma3")),
    Case("llava_next", ImageOptions(detail="low"), resized=shrunk(SIZE, 32 * 32)),
    Case("llava_next", ImageOptions(detail="low", max_pixels=500), resized=shrunk(SIZE, 500)),
    Case("gemma3", ImageOptions(detail="high"), (300, 900), settings={"do_pan_and_scan": True}),
    Case("gemma3", ImageOptions(detail="high"), SIZE, settings={"do_pan_and_scan": True}),
    Case(
        "gemma3",
        ImageOptions(detail="high", settings={"pan_and_scan_min_crop_size": 40, "pan_and_scan_max_num_crops": 3}),
        settings={"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 40, "pan_and_scan_max_num_crops": 3},
    ),
    Case("gemma3", ImageOptions(detail="high", settings={"do_pan_and_scan": False})),
    # An edge in pixels that every picture is given.
    *(
        case
        for name in ("idefics3", "smolvlm")
        for case in (
            Case(name, ImageOptions(detail="low"), settings=WHOLE),
            Case(name, ImageOptions(detail="low", max_pixels=1500), settings=WHOLE | edge(math.floor(math.sqrt(1500 * RATIO)))),
            Case(name, ImageOptions(max_pixels=1500), settings=edge(math.floor(math.sqrt(1500 * RATIO)))),
            Case(name, ImageOptions(min_pixels=9000), settings=edge(math.ceil(math.sqrt(9000 * RATIO)))),
            Case(name, ImageOptions(settings={"size": {"longest_edge": 60}}), settings=edge(60)),
            Case(name, ImageOptions(detail="low", settings={"do_image_splitting": True})),
        )
    ),
    # The numbers of pixels that the processor asks for.
    *(
        case
        for name in ("qwen2_vl", "qwen2_5_vl")
        for case in (
            Case(name, ImageOptions(detail="low")),
            Case(name, ImageOptions(detail="low", max_pixels=600_000), LARGE, settings=area(256, 512 * 512)),
            Case(name, ImageOptions(max_pixels=1500), settings=area(256, 1500)),
            Case(name, ImageOptions(max_pixels=100), settings=area(100, 100)),
            Case(name, ImageOptions(min_pixels=1000), (12, 20), settings=area(1000, 3840)),
            Case(name, ImageOptions(min_pixels=9000), settings=area(9000, 9000)),
            Case(name, ImageOptions(min_pixels=5000, max_pixels=9000), settings=area(5000, 9000)),
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pixels_and_tokens_equal_the_reference_processors(case: Case) -> None:
    expected = reference(case)

    arrays, layout, num_tokens = preprocessor(case.name).process(picture(case.size), case.options)

    pixels = normalize(torch.from_numpy(arrays["pixel_values"]), torch.from_numpy(arrays[MEAN_AND_STD]))
    assert torch.equal(pixels.reshape(-1), of_one_frame(case.name, expected["pixel_values"]).reshape(-1))
    family = load_family(tiny_folder(case.name))
    assert family is not None
    assert reference_processor(case.name).tokenizer(family.expand(layout))["input_ids"] == expected["input_ids"][0].tolist()
    assert num_tokens == int((expected["input_ids"] == family.image_token_id).sum())


def reference(case: Case) -> dict[str, Any]:
    """The reference's processor, called plainly."""
    processor = reference_processor(case.name)
    pixels = torch.from_numpy(picture(case.size)).permute(2, 0, 1)
    if case.resized:
        pixels = transforms.resize(pixels, list(case.resized), transforms.InterpolationMode.BICUBIC, antialias=True)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return dict(processor(images=[image], text=processor.image_token, return_tensors="pt", **case.settings))


def of_one_frame(name: str, pixel_values: torch.Tensor) -> torch.Tensor:
    """A still picture is its own next frame for the video towers; ours travels once."""
    return pixel_values.view(pixel_values.shape[0], 3, 2, -1)[:, :, 0] if name.startswith("qwen") else pixel_values


CHANGING = [case for case in CASES if case.options != ImageOptions()]


@pytest.mark.parametrize("case", [case for case in CHANGING if case.settings or case.resized], ids=str)
def test_a_setting_has_an_effect(case: Case) -> None:
    given, plain = (preprocessor(case.name).process(picture(case.size), options)[0] for options in (case.options, ImageOptions()))

    assert not np.array_equal(given["pixel_values"], plain["pixel_values"])


@pytest.mark.parametrize("case", CHANGING, ids=str)
def test_a_size_alone_tells_the_layout(case: Case) -> None:
    for size in (case.size, (1, 1), (1, 40), (40, 1), (33, 31)):
        _, layout, num_tokens = preprocessor(case.name).process(picture(size), case.options)

        assert preprocessor(case.name).measure(size, case.options) == (layout, num_tokens)


@pytest.mark.parametrize(("name", "detail"), [("gemma3", "high"), ("idefics3", "low"), ("llava_next", "low")])
def test_tiles_and_crops_are_embedded_as_the_reference_does(name: str, detail: str) -> None:
    """The number of tiles differs from that of `auto`."""
    case = next(case for case in CHANGING if (case.name, case.options.detail) == (name, detail))
    inputs = {key: value for key, value in reference(case).items() if key.startswith(("pixel", "image"))}
    with torch.inference_mode():
        expected = reference_model(name).get_image_features(**inputs, return_dict=True).pooler_output
    arrays, _, num_tokens = preprocessor(name).process(picture(case.size), case.options)

    (rows,) = encoder(name).encode([{key: torch.from_numpy(value.copy()) for key, value in arrays.items()}])

    assert len(rows) == num_tokens != preprocessor(name).measure(case.size, ImageOptions())[1]
    assert torch.allclose(rows, torch.cat([part.reshape(-1, part.shape[-1]) for part in expected]), atol=1e-5)


SIDES = st.one_of(st.integers(1, 60), st.integers(1, 4000))


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=30, deadline=None)
@given(height=SIDES, width=SIDES, most=st.sampled_from([None, 300, 100_000]))
def test_more_detail_never_takes_fewer_tokens(name: str, height: int, width: int, most: int | None) -> None:
    if max(height, width) > 200 * min(height, width):  # refused by Qwen2-VL's processor
        return
    low, auto, high = (
        preprocessor(name).measure((height, width), ImageOptions(detail, max_pixels=most))[1] for detail in ("low", "auto", "high")
    )

    assert low <= auto <= high
    assert auto == high or name == "gemma3"


def test_a_rounded_row_of_patches_more_is_no_reason_to_take_more_tokens(tmp_path: Any) -> None:
    """318 × 384 pixels: LLaVA-NeXT's rounding would give the smaller picture 48 tokens more."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(tiny_folder("llava_next"))
    grids = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    for file in tiny_folder("llava_next").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "processor_config.json").unlink()
    write_real_size(tmp_path, processor, grids)
    real = ImagePreprocessor(str(tmp_path))

    low, auto = (real.measure((318, 384), ImageOptions(detail))[1] for detail in ("low", "auto"))
    smaller = real.measure(shrunk((318, 384), 336 * 336), ImageOptions())[1]

    assert low == auto < smaller


def write_real_size(folder: Any, processor: Any, grids: list[list[int]]) -> None:
    import json

    image_processor = processor.to_dict() | {"image_grid_pinpoints": grids}
    image_processor |= {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    settings = json.loads((tiny_folder("llava_next") / "processor_config.json").read_text())
    settings |= {"image_processor": image_processor, "patch_size": 14}
    (folder / "processor_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_smallest_budgets_are_kept(name: str) -> None:
    """torch cannot resize to a single pixel."""
    rules = preprocessor(name)._family.rules.resolution
    smallest = [ImageOptions(detail, max_pixels=LEAST_BUDGET_PIXELS) for detail in ("auto", "low", "high")]
    if "size.longest_edge" in rules.settings:
        smallest.append(ImageOptions(settings={"size": {"longest_edge": 2}}))

    for size in ((1, 1), (1, 2), (2, 2), (20, 13), (84, 8), (8, 84), (1, 190), (190, 1), (200, 200)):
        for options in smallest:
            _, layout, num_tokens = preprocessor(name).process(picture(size), options)

            assert preprocessor(name).measure(size, options) == (layout, num_tokens)


LONG = [
    ("llava", (1, 300_000), ImageOptions()),
    ("llava", (300_000, 1), ImageOptions()),
    ("llava", (1, 200_000), ImageOptions(min_pixels=50_000_000)),
    ("qwen2_vl", (1, 1), ImageOptions(min_pixels=400_000_000)),
]


@pytest.mark.parametrize(("name", "size", "options"), LONG, ids=str)
def test_no_small_file_becomes_a_huge_picture(name: str, size: tuple[int, int], options: ImageOptions) -> None:
    """Found before any memory is taken: the pixels here would be gigabytes."""
    with pytest.raises(ValueError, match=str(MAX_ELEMENTS)):
        preprocessor(name).measure(size, options)
    with pytest.raises(ValueError, match=str(MAX_ELEMENTS)):
        preprocessor(name).process(np.broadcast_to(np.zeros(3, np.uint8), (*size, 3)), options)


@given(height=st.integers(1, 100_000), width=st.integers(1, 100_000), bounds=st.tuples(st.integers(0, 10**7), st.integers(1, 10**7)))
def test_a_fitted_size_keeps_to_the_most_and_reaches_the_least(height: int, width: int, bounds: tuple[int, int]) -> None:
    least, most = min(bounds), max(bounds)

    fitted = fitted_size((height, width), least, most)

    assert min(fitted) >= 1
    assert fitted != (1, 1) or most < LEAST_BUDGET_PIXELS or (height, width) == (1, 1)
    assert math.prod(fitted) <= most
    if height * width < least and fitted[0] * fitted[1] < least:  # only where rounding up would be more than the most
        assert math.prod(grown((height, width), least)) > most
    if least <= height * width <= most:
        assert fitted == (height, width)


@given(height=st.integers(1, 4000), width=st.integers(1, 4000), most=st.integers(10_000, LOW_DETAIL_PIXELS))
def test_a_fitted_size_keeps_the_aspect(height: int, width: int, most: int) -> None:
    fitted = fitted_size((height, width), 0, most)

    scale = min(1.0, math.sqrt(most / (height * width)))
    if min(height, width) * scale >= 1:
        assert all(side * scale - 1 < fitted_side <= side * scale + 1e-6 for side, fitted_side in zip((height, width), fitted, strict=True))


def test_every_setting_that_a_family_allows_is_one_of_its_image_processors() -> None:
    for name in FAMILIES:
        family = load_family(tiny_folder(name))
        assert family is not None
        known = reference_processor(name).image_processor.valid_kwargs.__annotations__

        rules = family.rules.resolution
        outer = {setting.partition(".")[0] for setting in (*rules.settings, *rules.other_names, *rules.low, *rules.high)}
        assert outer <= {*known, "size"}
