"""Where in a picture the pixels lie that the model sees, family by family.

A model sees a picture resized, with parts cut off or a border around it, and some models see tiles of it beside the whole. Each of these is
a `View`, made of the picture by the steps that the family's image processor takes. Arithmetic only: touches no pixels, and knows nothing of
tokens or of what models write about places.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Size = tuple[int, int]  # (height, width)
Settings = Mapping[str, Any]  # of the image processor, as it runs for this picture


@dataclass(frozen=True, slots=True)
class View:
    """A rectangle of pixels that the model sees.

    Its point (x, y), counted in pixels from its upper left corner, is ((x + offset_x) * scale_x, (y + offset_y) * scale_y) of the original.
    """

    width: int
    height: int
    offset_x: float = 0.0  # in pixels of the view; above 0 something was cut off on the left, below 0 a border was added
    offset_y: float = 0.0
    scale_x: float = 1.0  # pixels of the original per pixel of the view
    scale_y: float = 1.0

    @property
    def size(self) -> Size:
        return self.height, self.width

    def resized(self, size: Size) -> "View":
        """All of it in another size."""
        height, width = size
        x, y = self.width / width, self.height / height
        return View(width, height, self.offset_x / x, self.offset_y / y, self.scale_x * x, self.scale_y * y)

    def cut(self, top: int, left: int, size: Size) -> "View":
        """A part of it that begins at `top` and `left`; where it reaches beyond, a border is added."""
        height, width = size
        return View(width, height, self.offset_x + left, self.offset_y + top, self.scale_x, self.scale_y)

    def centred(self, size: Size) -> "View":
        """The middle of it; where it is smaller, a border around it. An odd pixel is on the right or below."""
        (top, left) = (_half(have - want) for have, want in zip(self.size, size, strict=True))
        return self.cut(top, left, size)


# From the processor's settings, the layout of its outputs, the (height, width) of each of its tiles, and the picture that it was given, to
# the views: the whole picture first, then its tiles in the order in which the model reads them.
Views = Callable[[Settings, Mapping[str, Any], Size, View], list[View]]


def of_one_tile(settings: Settings, layout: Mapping[str, Any], tile: Size, picture: View) -> list[View]:
    """CLIP's and SigLIP's: a square, which may leave out the ends of a long picture."""
    if settings.get("do_pad"):
        picture = picture.centred((max(picture.size), max(picture.size)))
    return [_prepared(picture, settings)]


def of_pinpoints(settings: Settings, layout: Mapping[str, Any], tile: Size, picture: View) -> list[View]:
    """LLaVA-NeXT's: the whole picture squeezed into a tile, then tiles of it in its own aspect with a border around."""
    from transformers.image_processing_utils import select_best_resolution

    size = _given(settings["size"])
    square = (size["height"], size["width"]) if "height" in size else (size["shortest_edge"], size["shortest_edge"])
    canvas = select_best_resolution(picture.size, settings["image_grid_pinpoints"])
    side = _given(settings.get("crop_size") or {}).get("height") or square[0]
    spread = picture.resized(_within(picture.size, canvas)).centred(canvas)
    tiles = [spread.cut(top, left, (side, side)) for top, left in _corners(canvas, (side, side))]
    return [_prepared(view, settings) for view in (picture.resized(square), *tiles)]


def of_rows_and_columns(settings: Settings, layout: Mapping[str, Any], tile: Size, picture: View) -> list[View]:
    """Idefics3's: the whole picture squeezed into a tile, and tiles of it resized to as many rows and columns."""
    height, width = tile
    canvas = (layout["rows"] * height, layout["columns"] * width)
    tiles = [picture.resized(canvas).cut(top, left, tile) for top, left in _corners(canvas, tile)] if layout["rows"] else []
    return [picture.resized(tile), *tiles]


def of_patches(settings: Settings, layout: Mapping[str, Any], tile: Size, picture: View) -> list[View]:
    """Qwen's: the whole picture in whole patches, which `tile` has the size of."""
    merge_size = settings["merge_size"]
    return [picture.resized((layout["rows"] * merge_size * tile[0], layout["columns"] * merge_size * tile[1]))]


def of_crops(settings: Settings, layout: Mapping[str, Any], tile: Size, picture: View) -> list[View]:
    """Gemma 3's: the whole picture squeezed into a tile, and crops along its longer side, the last one as long as what is left."""
    if not layout["num_crops"]:
        return [picture.resized(tile)]
    height, width = picture.size
    if height > width:
        height = -(-height // layout["num_crops"])
    else:
        width = -(-width // layout["num_crops"])
    corners = _corners(picture.size, (height, width))
    crops = [picture.cut(top, left, (min(height, picture.height - top), min(width, picture.width - left))) for top, left in corners]
    return [view.resized(tile) for view in (picture, *crops)]


def _prepared(view: View, settings: Settings) -> View:
    """Resized and cropped as the processor's settings say."""
    if settings.get("do_resize"):
        view = view.resized(_resized_size(view.size, _given(settings["size"])))
    if settings.get("do_center_crop"):
        crop = _given(settings["crop_size"])
        view = view.centred((crop["height"], crop["width"]))
    return view


def _given(size: Settings | None) -> dict[str, int]:
    """Raises KeyError for a size that is not made of named edges."""
    if not isinstance(size, Mapping):
        raise KeyError(size)
    return {name: value for name, value in size.items() if value is not None}


def _resized_size(size: Size, asked: Mapping[str, int]) -> Size:
    """Raises KeyError for what no processor of a family in the table asks for."""
    if set(asked) != {"shortest_edge"}:
        return asked["height"], asked["width"]
    edge, (height, width) = asked["shortest_edge"], size
    return (int(edge * height / width), edge) if width <= height else (edge, int(edge * width / height))


def _within(size: Size, canvas: Size) -> Size:
    """The largest size of the same aspect that fits into `canvas`."""
    by_height, by_width = (room / length for room, length in zip(canvas, size, strict=True))
    if by_width < by_height:
        return min(math.ceil(size[0] * by_width), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(size[1] * by_height), canvas[1])


def _corners(canvas: Size, tile: Size) -> Sequence[tuple[int, int]]:
    """(top, left) of every tile of a canvas, row by row."""
    return list(itertools.product(range(0, canvas[0], tile[0]), range(0, canvas[1], tile[1])))


def _half(number: int) -> int:
    """Towards 0."""
    return int(number / 2)
