"""How many bytes and pixels the pictures of one request may still take. Counts; knows nothing of where pictures come from or go."""

from vision.config import VisionConfig
from vision.image import MediaError


class RequestRoom:
    """One request's room. Taking more than is left raises MediaError, and the rest of the request has no room either."""

    def __init__(self, config: VisionConfig) -> None:
        self._config = config
        self._num_bytes = 0
        self._num_pixels = 0

    def take_bytes(self, num_bytes: int) -> None:
        """Of a picture as it was sent."""
        self._num_bytes += num_bytes
        limit = self._config.max_request_picture_bytes
        if self._num_bytes > limit:
            raise _too_large(f"more than the {limit} bytes that are allowed (--max-request-picture-bytes)")

    def take_pixels(self, num_pixels: int) -> None:
        """Of a picture as its header says, or as it was decoded."""
        self._num_pixels += num_pixels
        limit = self._config.max_request_pixels
        if self._num_pixels > limit:
            raise _too_large(f"more than the {limit} pixels that are allowed (--max-request-pixels)")


def _too_large(what: str) -> MediaError:
    return MediaError("image_too_large", f"with this picture, those of the request have together {what}")
