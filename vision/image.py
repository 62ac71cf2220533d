"""The words of the vision package: where a picture comes from, what it became, and what can go wrong with it.

Plain data. Knows nothing of HTTP routes, of models or of scheduling.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from vision.geometry import View
from vision.shared_array import SharedArray


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """What a request may say about a picture's resolution."""

    detail: str = "auto"  # auto | low | high, as OpenAI
    min_pixels: int | None = None
    max_pixels: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # of the image processor, as `Resolution.settings` of its family allows

    @property
    def may_enlarge(self) -> bool:
        """Whether a processor could be asked for far more of a picture than it is."""
        return self.min_pixels is not None or self.max_pixels is not None or bool(self.settings)


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A picture named by a request."""

    url: str  # http(s):, data:, or file: under an allowed folder
    param: str  # the part's path in the request, e.g. messages[0].content[1].image_url
    options: ImageOptions = ImageOptions()
    data: bytes | None = None  # the file itself, where it was fetched before: then `url` is not looked at
    may_fail: bool = False  # the others go on without it, and its MediaError stands in its place


@dataclass(frozen=True, slots=True, weakref_slot=True)
class ProcessedImage:
    """A picture as the model's own image processor leaves it, before normalisation where the device can do that exactly."""

    content_hash: bytes  # of the bytes, the options and the processor's settings
    num_tokens: int
    arrays: dict[str, SharedArray]  # the encoder's inputs by name
    layout: dict[str, Any]  # plain numbers that the family expands its placeholder from, e.g. rows and columns of tiles
    width: int  # of the picture as shown, after its orientation was applied
    height: int
    timings_s: dict[str, float] = field(default_factory=dict)  # stage → seconds: fetch, decode, preprocess
    views: tuple[View, ...] = ()  # where in the picture the encoder's pixels lie: the whole, then its tiles; empty: not known


@dataclass(frozen=True, slots=True)
class MeasuredImage:
    """What a picture takes of a prompt, known from its size alone; the fields are those of `ProcessedImage`."""

    num_tokens: int
    layout: dict[str, Any]


class MediaError(Exception):
    """A picture that cannot be used. `message` is safe to show; it never holds a decoder's own text."""

    def __init__(self, code: str, message: str, *, param: str | None = None, status: int = 400, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.code = code  # stable: url_invalid, url_blocked, image_fetch_failed, image_fetch_timeout, image_too_large, image_decode_failed
        self.message = message
        self.param = param  # the ImageRef's
        self.status = status  # of the HTTP answer
        self.retry_after_s = retry_after_s  # where the same may work later

    @property
    def is_of_the_picture(self) -> bool:
        """Whether it would fail again: not where this server was too busy or broke down."""
        return self.status < 500 and self.status != 429


def salted_hash(content_hash: bytes, salt: str) -> bytes:
    """Another hash for each salt: pictures that are found by it are found by those with the same salt alone."""
    if not salt:
        return content_hash
    key = hashlib.blake2b(salt.encode(), digest_size=32).digest()
    return hashlib.blake2b(content_hash, key=key, digest_size=32).digest()
