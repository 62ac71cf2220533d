"""One picture's pixels → the vision encoder's inputs, through the model's own image processor (resize, crop, tiles).

Runs in a preprocessing worker, on the CPU. Pixels leave as un-normalised uint8 wherever normalising them later on the device gives the
reference's values bit for bit (tried when the processor is loaded), else as the reference's float32. Knows nothing of files or networks.
"""

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torchvision
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as transforms
from transformers import AutoImageProcessor

from vision.families import MEAN_AND_STD, Family, load_family, normalize
from vision.geometry import View
from vision.image import ImageOptions
from vision.resolution import Plan

MAX_ELEMENTS = 300_000_000  # of one tensor: a picture of 50 million pixels, as two frames of a video
MAX_USUAL_ASPECT = 50  # up to here no processor makes more of a picture than fits, unless the request asks for it

_PROBE_SIZES = ((41, 300), (700, 90))  # one below and one above a usual tile, neither square: both are padded, cropped or tiled
_RAW = {"do_rescale": False, "do_normalize": False}


class ImagePreprocessor:
    """The image processor of one checkpoint.

    Raises ValueError where the checkpoint takes no pictures.
    """

    def __init__(self, model_folder: str, *, trust_remote_code: bool = False) -> None:
        family = load_family(model_folder)
        if family is None:
            raise ValueError(f"the model in {model_folder} takes no pictures")
        self._family: Family = family
        self._processor = AutoImageProcessor.from_pretrained(model_folder, trust_remote_code=trust_remote_code, backend="torchvision")
        self._own = self._processor.to_dict()
        self._planned: tuple[tuple[int, int], ImageOptions, Plan] | None = None  # the last plan: `views` asks for that of `process`
        self._mean_and_std = self._find_mean_and_std()
        self.fingerprint = self._make_fingerprint()

    @property
    def gives_raw_pixels(self) -> bool:
        """True where pixels leave as uint8 and are normalised on the device."""
        return self._mean_and_std is not None

    def process(self, pixels: np.ndarray, options: ImageOptions) -> tuple[dict[str, np.ndarray], dict[str, Any], int]:
        """The encoder's inputs by name, the layout that the placeholder expands from, and the rows of the embedding.

        pixels: (height, width, 3) uint8, not kept. Raises ValueError where the model cannot take a picture of this shape.
        """
        size = pixels.shape[0], pixels.shape[1]
        plan = self._plan(size, options)
        if _may_grow(size, options):
            self._measure(size, plan, limit=MAX_ELEMENTS)
        picture = _resized(_channels_first(pixels), plan)
        if self._mean_and_std is None:
            arrays, layout = self._run(picture, plan.settings)
        else:
            arrays, layout = self._run(picture, {**plan.settings, **_RAW})
            arrays = {**arrays, "pixel_values": _as_uint8(arrays["pixel_values"]), MEAN_AND_STD: self._mean_and_std}
        return arrays, layout, self._family.num_tokens(layout)

    def views(self, size: tuple[int, int], options: ImageOptions, pixel_values: np.ndarray, layout: dict[str, Any]) -> list[View]:
        """Where in a picture of `size` = (height, width) the pixels lie that `process` gave of it; none where that is not known."""
        plan = self._plan(size, options)
        picture = View(width=size[1], height=size[0]).resized(plan.size)
        return self._family.views({**self._own, **plan.settings}, layout, pixel_values.shape, picture)

    def measure(self, size: tuple[int, int], options: ImageOptions) -> tuple[dict[str, Any], int]:
        """Layout and rows as `process` gives them for a picture of `size` = (height, width), without its pixels. Raises as it does.

        The reference's own code decides: it runs over tensors that have a shape and no memory (torch's meta device).
        """
        limit = MAX_ELEMENTS if _may_grow(size, options) else None
        layout = self._measure(size, self._plan(size, options), limit=limit)
        return layout, self._family.num_tokens(layout)

    def _plan(self, size: tuple[int, int], options: ImageOptions) -> Plan:
        if self._planned is None or self._planned[:2] != (size, options):
            self._planned = size, options, self._new_plan(size, options)
        return self._planned[2]

    def _new_plan(self, size: tuple[int, int], options: ImageOptions) -> Plan:
        """For `detail: low` that of `auto` where fewer pixels would be more tokens: rounding may give them a further row of patches."""
        resolution = self._family.rules.resolution
        plan = resolution.plan(size, options, self._own)
        if options.detail != "low" or plan.size == size:
            return plan
        auto = resolution.plan(size, replace(options, detail="auto"), self._own)
        low_tokens, auto_tokens = (self._family.num_tokens(self._measure(size, each)) for each in (plan, auto))
        return plan if low_tokens <= auto_tokens else auto

    def _measure(self, size: tuple[int, int], plan: Plan, *, limit: int | None = None) -> dict[str, Any]:
        """The layout. Raises ValueError where a tensor on the way would have more than `limit` elements."""
        with _TensorLimit(limit):
            picture = _resized(torch.empty(3, *size, dtype=torch.uint8, device="meta"), plan)
            return self._run(picture, {**plan.settings, **_RAW})[1]

    def _run(self, picture: torch.Tensor, settings: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """picture: (3, height, width) uint8."""
        options = {"input_data_format": "channels_first", "return_tensors": "pt", **self._family.rules.processor_options, **settings}
        outputs = self._processor(images=picture, **options)
        height, width = picture.shape[1:]
        return self._family.arrange({name: _as_array(value) for name, value in outputs.items()}, (height, width))

    def _find_mean_and_std(self) -> np.ndarray | None:
        """What uint8 pixels are normalised with later, (2, 3) float32; None where that would not equal the reference."""
        processor = self._processor
        mean, std = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
        if not (
            getattr(processor, "do_rescale", False) and getattr(processor, "do_normalize", False) and _is_triple(mean) and _is_triple(std)
        ):
            return None
        candidate = (torch.tensor([mean, std]) * (1.0 / processor.rescale_factor)).numpy()
        random = np.random.default_rng(0)
        probes = (_channels_first(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in _PROBE_SIZES)
        return candidate if all(self._is_exact(probe, candidate) for probe in probes) else None

    def _is_exact(self, picture: torch.Tensor, mean_and_std: np.ndarray) -> bool:
        expected = self._run(picture, {})[0]["pixel_values"]
        raw = self._run(picture, _RAW)[0]["pixel_values"]
        if not np.array_equal(raw, raw.astype(np.uint8)):
            return False
        return np.array_equal(normalize(torch.from_numpy(_as_uint8(raw)), torch.from_numpy(mean_and_std)).numpy(), expected)

    def _make_fingerprint(self) -> str:
        """Changes with everything that changes an encoder's inputs from equal pixels."""
        settings = {
            "processor": self._own,
            "options": dict(self._family.rules.processor_options),
            "family": self._family.model_type,
            "raw": self.gives_raw_pixels,
            "versions": [transformers.__version__, torchvision.__version__],
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _is_triple(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3


def _as_uint8(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.uint8)


def _as_array(value: Any) -> np.ndarray:
    """A tensor without memory becomes an array of its shape, of one byte."""
    if isinstance(value, torch.Tensor) and value.is_meta:
        return np.broadcast_to(np.uint8(0), value.shape)
    return np.asarray(value)


def _channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _resized(picture: torch.Tensor, plan: Plan) -> torch.Tensor:
    """picture: (3, height, width)."""
    if picture.shape[1:] == plan.size:
        return picture
    return transforms.resize(picture, list(plan.size), transforms.InterpolationMode.BICUBIC, antialias=True)


def _may_grow(size: tuple[int, int], options: ImageOptions) -> bool:
    """Whether a processor could make far more of a picture than it is."""
    return options.may_enlarge or max(size) > MAX_USUAL_ASPECT * min(size)


class _TensorLimit(TorchDispatchMode):
    """Refuses to make large tensors; over those without memory it costs none to find them."""

    def __init__(self, max_elements: int | None) -> None:
        super().__init__()
        self._max_elements = max_elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._max_elements is not None and isinstance(output, torch.Tensor) and output.numel() > self._max_elements:
            raise ValueError(f"{output.numel()} elements on the way; at most {self._max_elements} are allowed")
        return output
