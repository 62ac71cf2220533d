"""Pictures, tiny image-text checkpoints and their reference model and processor, made once per test session."""

import vision  # noqa: F401  first: it makes torchvision, and so transformers, importable

# isort: split
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from tests.tiny_models import write_tiny
from vision.config import VisionConfig
from vision.encoder import VisionEncoder
from vision.image import ImageOptions, ImageRef, MeasuredImage, ProcessedImage
from vision.processor import ImagePreprocessor
from vision.request_room import RequestRoom
from vision.shared_array import SharedArray
from vlm_server.embedded import embedded_model_folder
from vlm_server.pipeline import Pipeline

SIZES = {"wide": (30, 110), "tall": (120, 25), "exact": (32, 32), "large": (90, 150), "small": (9, 7), "dot": (1, 1)}  # height, width

EMBEDDED = "embedded"  # the embedded model, among the tiny ones

_FOLDER = tempfile.TemporaryDirectory(prefix="tiny-image-models-")


@functools.cache
def tiny_folder(name: str) -> Path:
    return embedded_model_folder() if name == EMBEDDED else write_tiny(name, Path(_FOLDER.name) / name)


@functools.cache
def reference_model(name: str) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(tiny_folder(name)).eval()


@functools.cache
def reference_processor(name: str) -> ProcessorMixin:
    return AutoProcessor.from_pretrained(tiny_folder(name))


@functools.cache
def preprocessor(name: str) -> ImagePreprocessor:
    return ImagePreprocessor(str(tiny_folder(name)))


@functools.cache
def encoder(name: str) -> VisionEncoder:
    config = AutoConfig.from_pretrained(tiny_folder(name))
    return VisionEncoder.build(config, dtype=torch.float32, device="cpu", load=functools.partial(copy_weights, name))


def copy_weights(name: str, module: torch.nn.Module) -> None:
    source = reference_model(name).state_dict()
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.copy_(source[key])


def picture(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8 noise over a gradient: every resize filter and every crop shows."""
    height, width = size
    noise = np.random.default_rng(seed).integers(0, 128, (height, width, 3))
    gradient = np.linspace(0, 127, width)[None, :, None] + np.zeros((height, 1, 3))
    return (noise + gradient).astype(np.uint8)


def encoder_inputs(name: str, pixels: np.ndarray) -> dict[str, torch.Tensor]:
    arrays, _, _ = preprocessor(name).process(pixels, ImageOptions())
    return {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}


def reference_inputs(name: str, pictures: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """What the reference's own image processor gives for all pictures together."""
    processor = reference_processor(name)
    text = " ".join([processor.image_token] * len(pictures))
    outputs = processor(images=[Image.fromarray(pixels) for pixels in pictures], text=text, return_tensors="pt")
    return {key: value for key, value in outputs.items() if key.startswith(("pixel", "image"))}


def reference_features(name: str, pixels: np.ndarray) -> torch.Tensor:
    """(num_tokens, hidden_size) as the reference model embeds this one picture."""
    with torch.inference_mode():
        features = reference_model(name).get_image_features(**reference_inputs(name, [pixels]), return_dict=True).pooler_output
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in features])


def images_of(pipeline: Pipeline) -> "FakeImages":
    """Those that the pipeline was given."""
    images = pipeline._loading._images
    assert isinstance(images, FakeImages)
    return images


class FakeImages:
    """Stands in for the vision service: `picture:NAME` is one of the given pictures, processed in this process."""

    def __init__(self, name: str, pictures: dict[str, np.ndarray]) -> None:
        self._name = name
        self._pictures = pictures
        self.asked: list[ImageRef] = []
        self.given: list[ProcessedImage] = []

    def request_room(self) -> RequestRoom:
        return RequestRoom(VisionConfig())

    async def load(
        self,
        refs: Any,
        *,
        tenant: str = "",
        room: RequestRoom | None = None,
        on_loaded: Callable[[ProcessedImage], None] | None = None,
    ) -> list[ProcessedImage]:
        self.asked += refs
        loaded = [self._load(ref) for ref in refs]
        for image in loaded if on_loaded else ():
            on_loaded(image)
        self.given += loaded
        return loaded

    async def measure(self, refs: Any, *, tenant: str = "") -> list[MeasuredImage]:
        measured = [
            preprocessor(self._name).measure(self._pictures[ref.url.removeprefix("picture:")].shape[:2], ref.options) for ref in refs
        ]
        return [MeasuredImage(num_tokens, layout) for layout, num_tokens in measured]

    def _load(self, ref: ImageRef) -> ProcessedImage:
        pixels = self._pictures[ref.url.removeprefix("picture:")]
        arrays, layout, num_tokens = preprocessor(self._name).process(pixels, ref.options)
        shared = {key: SharedArray.copy_of(value) for key, value in arrays.items()}
        timings_s = {"fetch": 0.5, "decode": pixels.size * 1e-6}
        return ProcessedImage(pixels.tobytes()[:16], num_tokens, shared, layout, pixels.shape[1], pixels.shape[0], timings_s)
