"""Stands in for a model's image processor inside the real preprocessing worker."""

import os
import signal
from typing import Any

import numpy as np

from vision.geometry import View
from vision.image import ImageOptions, MediaError


class FakeProcessor:
    """Halves the picture; one token per 4 of its pixels. `detail` low refuses, high raises, and a 13-wide picture kills the worker."""

    def __init__(self, model_folder: str, *, trust_remote_code: bool = False) -> None:
        if model_folder == "missing":
            raise FileNotFoundError("there is no such model")
        self.fingerprint = f"fake {model_folder} {trust_remote_code}"

    def process(self, pixels: np.ndarray[Any, Any], options: ImageOptions) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any], int]:
        if options.detail == "low":
            raise MediaError("image_too_small", "the picture is too small for this model")
        if options.detail == "high":
            raise ValueError("a text with a secret")
        if pixels.shape[1] == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        half = pixels[::2, ::2].copy()
        return {"pixel_values": half, "sizes": np.array(half.shape[:2], np.int64)}, *self.measure(pixels.shape[:2], options)

    def views(self, size: tuple[int, int], options: ImageOptions, pixel_values: np.ndarray[Any, Any], layout: dict[str, Any]) -> list[View]:
        return [View(size[1], size[0]).resized((pixel_values.shape[0], pixel_values.shape[1]))]

    def measure(self, size: tuple[int, int], options: ImageOptions) -> tuple[dict[str, Any], int]:
        rows, columns = (side + 1 >> 1 for side in size)
        return {"rows": rows}, rows * columns
