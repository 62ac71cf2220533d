"""Pictures for tests, drawn from a seed."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image


def noise(width: int, height: int, *, channels: int = 3, seed: int = 0) -> np.ndarray[Any, Any]:
    """(height, width, channels) uint8; (height, width) for one channel."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(width: int = 8, height: int = 6, *, seed: int = 0) -> bytes:
    return encoded(Image.fromarray(noise(width, height, seed=seed)), "PNG")


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()
