"""What a request says about its pictures' resolution, and which fields its refusals name."""

from typing import Any

import pytest

from engine.request import InvalidRequestError
from tests.image_fixtures import tiny_folder
from vision.families import load_family
from vision.image import ImageOptions
from vlm_server.image_protocol import ProcessorSettings
from vlm_server.message_schema import ChatMessage
from vlm_server.picture_parts import PictureParts

LIMIT = 1_000_000
PATH = "messages[0].content[1]"


def options_of(
    image: dict[str, Any] | None = None,
    part: dict[str, Any] | None = None,
    *,
    settings: dict[str, Any] | None = None,
    family: str = "llava",
) -> ImageOptions:
    """Of a picture that has these fields inside `image_url` and beside it, in a request with these settings."""
    pictures = PictureParts(load_family(tiny_folder(family)), LIMIT)
    given = ProcessorSettings.model_validate(settings or {}).as_dict()
    content = [{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": {"url": "u", **(image or {})}, **(part or {})}]
    message = ChatMessage.model_validate({"role": "user", "content": content}).as_dict()
    (ref,), (plain,) = pictures.split([message], {}, pictures.defaults(given))
    assert ref.param == f"{PATH}.image_url"
    assert plain["content"] == [{"type": "text", "text": "Look:"}, {"type": "image"}]
    return ref.options


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ImageOptions()),
        ({"image": {"detail": None, "min_pixels": None}}, ImageOptions()),
        ({"image": {"detail": "low"}}, ImageOptions("low")),
        ({"image": {"min_pixels": 4, "max_pixels": 5}}, ImageOptions("auto", 4, 5)),
        ({"part": {"min_pixels": 4, "max_pixels": 4}}, ImageOptions("auto", 4, 4)),
        ({"part": {"min_pixels": 4}, "image": {"min_pixels": 4, "max_pixels": LIMIT, "detail": "high"}}, ImageOptions("high", 4, LIMIT)),
        ({"settings": {"min_pixels": 4, "max_pixels": 5}}, ImageOptions("auto", 4, 5)),
        ({"settings": {"image": {"min_pixels": 4, "max_pixels": 5}}}, ImageOptions("auto", 4, 5)),
        ({"settings": {"image": None, "size": {}}}, ImageOptions()),
        ({"settings": {"min_pixels": 4, "max_pixels": 5}, "part": {"max_pixels": 9}}, ImageOptions("auto", 4, 9)),
        ({"settings": {"max_pixels": 9, "image": {"max_pixels": 9}}}, ImageOptions("auto", None, 9)),
        ({"settings": {"size": {"shortest_edge": 4, "longest_edge": 9}}, "family": "qwen2_vl"}, ImageOptions("auto", 4, 9)),
        (
            {"settings": {"size": {"longest_edge": 9}, "do_image_splitting": False}, "family": "idefics3"},
            ImageOptions(settings={"do_image_splitting": False, "size": {"longest_edge": 9}}),
        ),
        (
            {"settings": {"image": {"do_pan_and_scan": True}, "pan_and_scan_min_crop_size": 16}, "family": "gemma3"},
            ImageOptions(settings={"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16}),
        ),
    ],
    ids=str,
)
def test_a_pictures_own_fields_go_before_those_of_the_request(fields: dict[str, Any], expected: ImageOptions) -> None:
    assert options_of(**fields) == expected


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"image": {"max_pixels": LIMIT + 1}}, f"{PATH}.image_url.max_pixels"),
        ({"part": {"min_pixels": LIMIT + 1}}, f"{PATH}.min_pixels"),
        ({"image": {"min_pixels": 5, "max_pixels": 4}}, f"{PATH}.image_url.min_pixels"),
        ({"part": {"min_pixels": 5}, "image": {"max_pixels": 4}}, f"{PATH}.min_pixels"),
        ({"part": {"min_pixels": 5}, "image": {"min_pixels": 4}}, f"{PATH}.image_url.min_pixels"),
        ({"part": {"min_pixels": 5}, "settings": {"max_pixels": 4}}, f"{PATH}.min_pixels"),
        ({"settings": {"min_pixels": 5, "max_pixels": 4}}, "mm_processor_kwargs.max_pixels"),
        ({"settings": {"min_pixels": 5, "image": {"max_pixels": 4}}}, "mm_processor_kwargs.image.max_pixels"),
        ({"settings": {"min_pixels": 5, "image": {"min_pixels": 4}}}, "mm_processor_kwargs.min_pixels"),
        ({"settings": {"image": {"max_pixels": LIMIT + 1}}}, "mm_processor_kwargs.image.max_pixels"),
        ({"settings": {"size": {"longest_edge": LIMIT + 1}}, "family": "qwen2_vl"}, "mm_processor_kwargs.size.longest_edge"),
        ({"settings": {"size": {"longest_edge": 9}, "max_pixels": 8}, "family": "qwen2_vl"}, "mm_processor_kwargs.size.longest_edge"),
        ({"settings": {"size": {"longest_edge": 10**9}}, "family": "idefics3"}, "mm_processor_kwargs.size.longest_edge"),
        ({"settings": {"size": {"longest_edge": 1}}, "family": "idefics3"}, "mm_processor_kwargs.size.longest_edge"),
        ({"settings": {"size": {"shortest_edge": 9}}, "family": "idefics3"}, "mm_processor_kwargs.size.shortest_edge"),
        ({"settings": {"size": {"longest_edge": 9}}, "family": "llava"}, "mm_processor_kwargs.size.longest_edge"),
        ({"settings": {"do_image_splitting": False}, "family": "qwen2_vl"}, "mm_processor_kwargs.do_image_splitting"),
        ({"settings": {"image": {"do_pan_and_scan": True}}, "family": "llava_next"}, "mm_processor_kwargs.image.do_pan_and_scan"),
        ({"settings": {"pan_and_scan_max_num_crops": 17}, "family": "gemma3"}, "mm_processor_kwargs.pan_and_scan_max_num_crops"),
        ({"settings": {"pan_and_scan_min_crop_size": 1}, "family": "gemma3"}, "mm_processor_kwargs.pan_and_scan_min_crop_size"),
    ],
    ids=str,
)
def test_a_refusal_names_the_field(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        options_of(**fields)

    assert str(refused.value).startswith(f"{path}: ")


def test_a_model_without_pictures_has_no_such_settings() -> None:
    pictures = PictureParts(None)

    with pytest.raises(InvalidRequestError, match=r"^mm_processor_kwargs: "):
        pictures.defaults({"max_pixels": 9})
    assert pictures.defaults({}) == pictures.defaults(None) == ImageOptions()


def test_a_settings_refusal_says_which_there_are() -> None:
    with pytest.raises(InvalidRequestError, match=r"do_image_splitting, size\.longest_edge$"):
        options_of(settings={"do_pan_and_scan": True}, family="smolvlm")


@pytest.mark.parametrize(
    ("param", "named"),
    [
        ("prompt[2].content[0].image_url", ["prompt[2].content[0].max_pixels", "prompt[2].content[0].image_url.max_pixels"]),
        ("input[0][1]", ["input[0][1].max_pixels", "input[0][1].image_url.max_pixels"]),
    ],
)
def test_a_refusal_names_the_field_as_its_own_route_does(param: str, named: list[str]) -> None:
    pictures = PictureParts(load_family(tiny_folder("llava")), LIMIT)
    too_many = {"max_pixels": LIMIT + 1}

    for part, path in zip(({"image_url": {"url": "u"}, **too_many}, {"image_url": {"url": "u", **too_many}}), named, strict=True):
        with pytest.raises(InvalidRequestError) as refused:
            pictures.plain({"type": "image_url", **part}, param, [], ImageOptions())

        assert str(refused.value).startswith(f"{path}: ")
