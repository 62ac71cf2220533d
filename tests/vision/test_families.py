import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.image_fixtures import picture, preprocessor, reference_model, reference_processor, tiny_folder
from tests.tiny_models import image_model_names, text_model_names, write_tiny
from vision.families import load_family
from vision.image import ImageOptions

FAMILIES = image_model_names()
EXTREMES = [(1, 1), (1, 60), (60, 1), (32, 32), (33, 31), (31, 33), (64, 64), (96, 32), (65, 130), (200, 201), (7, 300), (300, 7)]


@pytest.mark.parametrize("size", EXTREMES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_placeholder_expands_as_the_references_does(name: str, size: tuple[int, int]) -> None:
    family, processor = load_family(tiny_folder(name)), reference_processor(name)
    assert family is not None
    pixels = picture(size)
    try:
        (expected,) = processor._process_images([torch.from_numpy(pixels).permute(2, 0, 1)], **image_options(name))[1]
    except (ValueError, ZeroDivisionError):
        with pytest.raises((ValueError, ZeroDivisionError)):
            preprocessor(name).process(pixels, ImageOptions())
        return

    arrays, layout, num_tokens = preprocessor(name).process(pixels, ImageOptions())

    assert family.expand(layout) == expected
    assert num_tokens == expected.count(family.image_token)
    assert all(array.size for array in arrays.values())


def image_options(name: str) -> dict[str, object]:
    return {"return_tensors": "pt", "input_data_format": "channels_first", **getattr(reference_processor(name), "images_kwargs", {})}


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6), st.integers(1, 6)), max_size=4), st.integers(0, 9))
def test_three_axis_positions_equal_the_references(pictures: list[tuple[int, int, int]], num_last: int) -> None:
    """Each picture: the text before it, its rows and its columns."""
    family, model = load_family(tiny_folder("qwen2_5_vl")), reference_model("qwen2_5_vl")
    assert family is not None
    kinds: list[int] = []
    starts = []
    for num_text, rows, columns in pictures:
        kinds += [0] * (num_text + 1)  # the reference needs a token between two pictures
        starts.append((len(kinds), {"rows": rows, "columns": columns}))
        kinds += [1] * (rows * columns)
    kinds += [0] * (num_last + 1)
    grids = torch.tensor([[1, 2 * rows, 2 * columns] for _, rows, columns in pictures] or [[1, 0, 0]])

    positions, delta = family.positions(len(kinds), starts)

    expected, expected_delta = model.model.get_rope_index(
        torch.zeros((1, len(kinds)), dtype=torch.long), torch.tensor([kinds], dtype=torch.int), image_grid_thw=grids
    )
    assert positions == tuple(tuple(axis) for axis in expected[:, 0].tolist())
    assert delta == expected_delta.item()
    assert max(positions[0][-1:]) + 1 == len(kinds) + delta


@pytest.mark.parametrize("name", FAMILIES)
def test_only_three_axis_families_have_positions(name: str) -> None:
    family = load_family(tiny_folder(name))
    assert family is not None

    assert family.has_positions == name.startswith("qwen")
    if not family.has_positions:
        assert family.positions(12, [(3, {})]) == (None, 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_token_is_the_one_that_the_model_replaces(name: str) -> None:
    family = load_family(tiny_folder(name))
    assert family is not None

    assert family.image_token_id == reference_model(name).config.image_token_id
    assert family.image_token_id == reference_processor(name).tokenizer.convert_tokens_to_ids(family.image_token)
    assert family.placeholder == reference_processor(name).image_token


def test_a_text_model_has_no_family(tmp_path: Path) -> None:
    for name in text_model_names():
        assert load_family(write_tiny(name, tmp_path / name)) is None


def test_an_unknown_image_text_family_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mystery_vl", "vision_config": {}}))

    with pytest.raises(ValueError, match="'mystery_vl' is not a known image-text family; known are gemma3, idefics3, llava"):
        load_family(tmp_path)


def test_the_server_can_expand_placeholders_without_torch() -> None:
    layouts = SimpleNamespace(gemma3={"num_crops": 0, "tokens_per_tile": 4}, qwen2_5_vl={"rows": 2, "columns": 3})
    code = (
        "import sys; from vision.families import load_family\n"
        f"print(len(load_family({str(tiny_folder('gemma3'))!r}).expand({layouts.gemma3!r})))\n"
        f"print(load_family({str(tiny_folder('qwen2_5_vl'))!r}).positions(9, [(1, {layouts.qwen2_5_vl!r})])[1])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )

    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert output.split() == [str(len("\n\n<start_of_image>" + "<image_soft_token>" * 4 + "<end_of_image>\n\n")), "-3"]
