import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.image_fixtures import preprocessor, tiny_folder
from tests.tiny_models import image_model_names
from vision.geometry import View
from vision.image import ImageOptions
from vision.processor import ImagePreprocessor

FAMILIES = image_model_names()
MARGIN = 4  # pixels of the view between the box and the view's edge, where filters see no neighbours
LEAST = 8  # the box's, in pixels of the view

sizes = st.tuples(st.integers(40, 260), st.integers(40, 260))
squarish = st.tuples(st.integers(140, 200), st.integers(140, 200))
fractions = st.tuples(*[st.floats(0, 1)] * 4)
budgets = st.sampled_from([ImageOptions(), ImageOptions(detail="low"), ImageOptions(max_pixels=3000), ImageOptions(min_pixels=60_000)])


def seen_views(processor: ImagePreprocessor, pixels: np.ndarray, options: ImageOptions) -> tuple[list[View], list[np.ndarray]]:
    """What the processor says of its views, and the pixels of each: (3, height, width)."""
    arrays, layout, _ = processor.process(pixels, options)
    views = processor.views((pixels.shape[0], pixels.shape[1]), options, arrays["pixel_values"], layout)
    tiles = arrays["pixel_values"]
    if "image_grid_thw" in arrays:  # patches, in squares of 2 by 2
        rows, columns, patch = layout["rows"], layout["columns"], tiles.shape[-1]
        whole = tiles.reshape(rows, columns, 2, 2, 3, patch, patch).transpose(4, 0, 2, 5, 1, 3, 6)
        return views, [whole.reshape(3, rows * 2 * patch, columns * 2 * patch)]
    ordered = [*tiles[-1:], *tiles[:-1]] if "tokens_per_tile" in layout and "rows" in layout else list(tiles)  # Idefics3: the whole last
    return views, ordered


def placed(low: float, high: float, scale: float, ends: tuple[float, float]) -> tuple[int, int] | None:
    """A stretch of whole pixels of the original between `low` and `high`, away from both; None where there is no room."""
    least, margin = LEAST * max(1.0, scale), MARGIN * max(1.0, scale)
    room = high - low - 2 * margin - least
    if room < 2:
        return None
    begin = low + margin + ends[0] * room
    end = begin + least + ends[1] * (high - margin - least - begin)
    return round(begin), round(end)


def edges(profile: np.ndarray) -> tuple[float, float]:
    """Where a bright stretch of a dark line begins and ends, between pixels too."""
    weights = profile / profile.max()
    centre = (weights * (np.arange(len(profile)) + 0.5)).sum() / weights.sum()
    return centre - weights.sum() / 2, centre + weights.sum() / 2


def check_box(processor: ImagePreprocessor, size: tuple[int, int], options: ImageOptions, which: float, at: Any) -> None:
    """Draws a white box into a black picture, finds it in the pixels that the model is given, and takes it back."""
    height, width = size
    black = np.zeros((height, width, 3), np.uint8)
    views, dark = seen_views(processor, black, options)
    index = round(which * (len(views) - 1))
    for number in (index, 0):  # a tile may show little of the picture; the whole always has room
        view = views[number]
        x = placed(max(0, view.offset_x * view.scale_x), min(width, (view.width + view.offset_x) * view.scale_x), view.scale_x, at[:2])
        y = placed(max(0, view.offset_y * view.scale_y), min(height, (view.height + view.offset_y) * view.scale_y), view.scale_y, at[2:])
        if x and y:
            break
    assert x
    assert y
    black[y[0] : y[1], x[0] : x[1]] = 255

    _, tiles = seen_views(processor, black, options)

    tile = np.abs(np.subtract(tiles[number][0], dark[number][0], dtype=float))  # without what a border adds
    assert tile.shape == view.size
    left, right = edges(tile.max(axis=0))
    top, bottom = edges(tile.max(axis=1))
    found = [(left + view.offset_x) * view.scale_x, (right + view.offset_x) * view.scale_x]
    found += [(top + view.offset_y) * view.scale_y, (bottom + view.offset_y) * view.scale_y]
    assert np.abs(np.subtract(found, [*x, *y])).max() <= max(1.0, view.scale_x / 8, view.scale_y / 8)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(size=sizes, options=budgets, which=st.floats(0, 1), at=fractions)
def test_a_box_that_the_model_sees_comes_back_within_a_pixel_of_the_original(
    name: str, size: tuple[int, int], options: ImageOptions, which: float, at: Any
) -> None:
    check_box(preprocessor(name), size, options, which, at)


@settings(max_examples=15, deadline=None)
@given(size=sizes, most=st.integers(2, 5), which=st.floats(0, 1), at=fractions)
def test_a_box_in_a_crop_comes_back_too(size: tuple[int, int], most: int, which: float, at: Any) -> None:
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16, "pan_and_scan_max_num_crops": most}

    check_box(preprocessor("gemma3"), size, ImageOptions(settings=crops), which, at)


@pytest.mark.parametrize("name", ["idefics3", "llava_next", "gemma3"])
@settings(max_examples=20, deadline=None)
@given(size=st.tuples(st.integers(40, 90), st.integers(150, 260)), is_upright=st.booleans())
def test_tiles_together_show_the_whole_picture_once(name: str, size: tuple[int, int], is_upright: bool) -> None:
    height, width = size[::-1] if is_upright else size
    options = ImageOptions(settings={"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16}) if name == "gemma3" else ImageOptions()

    (whole, *seen), tiles = seen_views(preprocessor(name), np.zeros((height, width, 3), np.uint8), options)

    assert corners(whole) == pytest.approx((0, 0, width, height))
    assert len(seen) == len(tiles) - 1 > 1
    shown = [(max(left, 0), max(top, 0), min(right, width), min(bottom, height)) for left, top, right, bottom in map(corners, seen)]
    areas = [max(0, right - left) * max(0, bottom - top) for left, top, right, bottom in shown]
    assert sum(areas) == pytest.approx(width * height)
    assert len({(view.offset_x, view.offset_y) for view in seen}) == len(seen)


OTHER_PROCESSORS: dict[str, dict[str, Any]] = {
    "squeezed": {"size": {"height": 32, "width": 48}, "do_center_crop": False},
    "a border around": {"image_processor_type": "LlavaImageProcessor", "do_pad": True},
    "smaller than its crop": {"size": {"shortest_edge": 20}},
    "squeezed, then cropped": {"size": {"height": 60, "width": 60}},
}


@pytest.mark.parametrize("changes", OTHER_PROCESSORS.values(), ids=OTHER_PROCESSORS)
@settings(max_examples=10, deadline=None)
@given(size=squarish, at=fractions)
def test_a_checkpoints_own_settings_are_kept(changes: dict[str, Any], size: tuple[int, int], at: Any, tmp_path_factory: Any) -> None:
    processor = with_settings(tmp_path_factory.getbasetemp() / str(abs(hash(str(changes)))), changes)

    check_box(processor, size, ImageOptions(), 0, at)


_MADE: dict[Path, ImagePreprocessor] = {}


def with_settings(folder: Path, changes: dict[str, Any]) -> ImagePreprocessor:
    """LLaVA's tiny checkpoint with another image processor."""
    if folder not in _MADE:
        folder.mkdir()
        for file in tiny_folder("llava").iterdir():
            (folder / file.name).symlink_to(file)
        config = json.loads((folder / "processor_config.json").read_text())
        config["image_processor"] |= changes
        (folder / "processor_config.json").unlink()
        (folder / "processor_config.json").write_text(json.dumps(config))
        _MADE[folder] = ImagePreprocessor(str(folder))
    return _MADE[folder]


@pytest.mark.parametrize("own", [{"do_center_crop": False}, {"size": 32}, {"size": None}, {"size": {"max_height": 32}}], ids=str)
def test_a_processor_that_works_in_another_way_leaves_the_places_unknown(own: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    processor = ImagePreprocessor(str(tiny_folder("llava")))
    monkeypatch.setattr(processor, "_own", processor._own | own)

    assert processor.views((40, 90), ImageOptions(), np.zeros((1, 3, 32, 32), np.uint8), {}) == []


views = st.builds(View, st.integers(1, 500), st.integers(1, 500), *[st.floats(-50, 50)] * 2, *[st.floats(0.1, 10)] * 2)


@given(view=views, size=st.tuples(st.integers(1, 500), st.integers(1, 500)))
def test_resizing_keeps_the_corners_where_they_are(view: View, size: tuple[int, int]) -> None:
    resized = view.resized(size)

    assert resized.size == size
    assert corners(resized) == pytest.approx(corners(view))


@given(view=views, top=st.integers(-50, 50), left=st.integers(-50, 50))
def test_cutting_moves_the_corner_by_whole_pixels_of_the_view(view: View, top: int, left: int) -> None:
    part = view.cut(top, left, (5, 7))

    x, y, right, bottom = corners(part)
    assert (x, y) == pytest.approx((corners(view)[0] + left * view.scale_x, corners(view)[1] + top * view.scale_y))
    assert (right - x, bottom - y) == pytest.approx((7 * view.scale_x, 5 * view.scale_y))


def corners(view: View) -> tuple[float, ...]:
    """Left, top, right and bottom in the original."""
    return (
        view.offset_x * view.scale_x,
        view.offset_y * view.scale_y,
        (view.width + view.offset_x) * view.scale_x,
        (view.height + view.offset_y) * view.scale_y,
    )
