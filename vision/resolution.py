"""What `detail`, a pixel budget and a request's processor settings come to, family by family.

A family whose image processor keeps a budget itself is told of it in that processor's words; for the others the picture is resized
beforehand. Arithmetic only: imports neither torch nor the reference library, and resizes nothing itself.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vision.image import ImageOptions

LOW_DETAIL_PIXELS = 512 * 512  # what `detail: low` leaves of a picture, as in OpenAI's own budget
LEAST_BUDGET_PIXELS = 4  # below, a picture could become a single pixel, to which torch does not resize

_LONGEST_EDGES = (2, 4096)  # the least for the same reason, the most the reference's own limit

Size = tuple[int, int]  # (height, width)
Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done with one picture."""

    size: Size  # that it is resized to before the image processor sees it
    settings: dict[str, Any]  # that the image processor is called with, beside its own


@dataclass(frozen=True, slots=True)
class Budget:
    """Of one picture, in pixels. 0 and infinity: not asked for."""

    least: int = 0
    most: float = math.inf
    low: float = math.inf  # the limit that `detail: low` sets, whatever else is asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """One family's rules. `detail: auto` without a budget and without settings is always the reference's own default."""

    spend: Callable[[Size, Budget, Settings], Plan]  # how a budget is kept, given the image processor's settings
    low_pixels: Callable[[Settings], int] = lambda settings: LOW_DETAIL_PIXELS
    low: Settings = field(default_factory=dict)  # what `detail` sets, unless the request sets it otherwise
    high: Settings = field(default_factory=dict)
    settings: Mapping[str, tuple[float, float] | None] = field(default_factory=dict)  # what requests may set: a range; None for a switch
    other_names: Mapping[str, str] = field(default_factory=dict)  # of min_pixels and max_pixels, in the image processor's words

    def plan(self, size: Size, options: ImageOptions, own: Settings) -> Plan:
        """own: the image processor's settings, as its `to_dict` gives them."""
        given = {**{"low": self.low, "high": self.high}.get(options.detail, {}), **options.settings}
        low = self.low_pixels(own) if options.detail == "low" else math.inf
        budget = Budget(options.min_pixels or 0, options.max_pixels or math.inf, low)
        plan = self.spend(size, budget, {**own, **given})
        return Plan(plan.size, {**given, **plan.settings})


def resized(size: Size, budget: Budget, settings: Settings) -> Plan:
    """For processors that make one size, or tiles of one size, of every picture."""
    return Plan(fitted_size(size, budget.least, min(budget.most, budget.low)), {})


def by_area(size: Size, budget: Budget, settings: Settings) -> Plan:
    """Qwen's: the two edges in `size` are numbers of pixels."""
    own = settings["size"]
    most = min(max(own["longest_edge"], budget.least) if budget.most == math.inf else budget.most, budget.low)
    least = min(budget.least or own["shortest_edge"], most)
    edges = {"shortest_edge": int(least), "longest_edge": int(most)}
    return Plan(size, {} if edges == own else {"size": edges})


def by_longest_edge(size: Size, budget: Budget, settings: Settings) -> Plan:
    """Idefics3's: every picture is given this edge, up or down, and is cut into tiles then; fewer pixels are fewer tiles."""
    own = settings["size"].get("longest_edge")
    if own is None:
        return resized(size, budget, settings)
    ratio = max(size) / min(size)  # an edge of e pixels makes a picture of e·e / ratio
    most = min(budget.most, budget.low)
    raised = max(own, min(math.ceil(math.sqrt(min(budget.least, most) * ratio)), _LONGEST_EDGES[1]))
    edge = max(1, math.floor(min(raised, math.sqrt(most * ratio))))
    return Plan(size, {} if edge == own else {"size": {"longest_edge": edge}})


def fitted_size(size: Size, least: int, most: float) -> Size:
    """The size within `least` and `most` pixels, of the same aspect as far as whole pixels allow; `most` is kept in any case."""
    height, width = size
    wanted = min(max(height * width, least), most)
    scale = math.sqrt(wanted / (height * width))
    if wanted > height * width:
        grown = math.ceil(height * scale), math.ceil(width * scale)
        if math.prod(grown) <= most:
            return grown
    if wanted == height * width:
        return size
    height, width = max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
    return min(height, max(1, int(most // width))), min(width, max(1, int(most // height)))  # for a side that would be less than a pixel


def _tile_pixels(settings: Settings) -> int:
    """LLaVA-NeXT's tiles are as high as they are wide. A picture of one tile's pixels gets the fewest tiles that there are."""
    crop, size = settings.get("crop_size") or {}, settings["size"]
    side = crop.get("height") or size.get("height") or size["shortest_edge"]
    return int(side * side)


FIXED_SIZE = Resolution(spend=resized)
LLAVA_NEXT = Resolution(spend=resized, low_pixels=_tile_pixels)
IDEFICS3 = Resolution(
    spend=by_longest_edge,
    low={"do_image_splitting": False},
    settings={"do_image_splitting": None, "size.longest_edge": _LONGEST_EDGES},
)
QWEN_VL = Resolution(spend=by_area, other_names={"size.shortest_edge": "min_pixels", "size.longest_edge": "max_pixels"})
GEMMA3 = Resolution(
    spend=resized,
    high={"do_pan_and_scan": True},
    settings={
        "do_pan_and_scan": None,
        # No crop has less than a pixel: at least as many pixels wide as there are crops.
        "pan_and_scan_min_crop_size": (16, 1 << 16),
        "pan_and_scan_max_num_crops": (1, 16),
        "pan_and_scan_min_ratio_to_activate": (1, 1000),
    },
)
