"""A download's body as it arrives: capped, decompressed within the cap, and refused where it only drips."""

import time
import zlib

from vision.data_url import too_many_bytes
from vision.image import MediaError

DRIP_GRACE_S = 5.0  # a slow beginning is no drip
_PLAIN = ("", "identity")
_ZLIB = ("gzip", "x-gzip", "deflate")


class CappedBody:
    """Collects a body and refuses it as soon as it is too large, sent compressed or not, or slower than `min_bytes_per_s` on average."""

    def __init__(self, limit_bytes: int, encoding: str, *, min_bytes_per_s: float = 0.0) -> None:
        """Some servers compress everything, although we ask for nothing compressed. Raises MediaError for what zlib does not read."""
        if encoding not in _PLAIN + _ZLIB:
            raise MediaError("image_fetch_failed", "the picture's server sent it in a compression that was not asked for")
        self.data = bytearray()
        self._limit_bytes = limit_bytes
        self._min_bytes_per_s = min_bytes_per_s
        self._num_received = 0
        self._started_s = time.monotonic()
        self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 32) if encoding in _ZLIB else None  # 32: a gzip or a zlib header

    @property
    def is_compressed(self) -> bool:
        """Whether `append` may take long for what it is given: a few kilobytes can unfold to the limit."""
        return self._zlib is not None

    @property
    def is_complete(self) -> bool:
        return self._zlib is None or self._zlib.eof

    def append(self, chunk: bytes) -> None:
        """Raises MediaError image_too_large or image_fetch_timeout, zlib.error for what cannot be decompressed."""
        room_bytes = self._limit_bytes - len(self.data) + 1
        self.data += chunk[:room_bytes] if self._zlib is None else self._zlib.decompress(chunk, room_bytes)
        if len(self.data) > self._limit_bytes:
            raise too_many_bytes(self._limit_bytes)
        self._num_received += len(chunk)
        elapsed_s = time.monotonic() - self._started_s
        if elapsed_s > DRIP_GRACE_S and self._num_received < self._min_bytes_per_s * elapsed_s:
            raise MediaError("image_fetch_timeout", "the picture's server sends it too slowly")
