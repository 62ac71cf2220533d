"""Brings a picture's bytes from wherever its URL says: http(s):, data:, or file: under one allowed folder.

Every limit holds before the bytes exist. Does not look into the bytes and knows nothing of decoding.
"""

import asyncio
import os
import stat
from pathlib import Path

from yarl import URL

from vision.addresses import LookUp
from vision.config import VisionConfig
from vision.data_url import decode_data_url, too_many_bytes
from vision.download import Downloader
from vision.http_cache import HttpCache
from vision.image import MediaError
from vision.single_flight import SingleFlight
from vision.urls import parse_url


class Fetcher:
    """One for all pictures. `open()` before use, `close()` after."""

    def __init__(self, config: VisionConfig, *, look_up: LookUp | None = None) -> None:
        """`look_up`: how host names become addresses; the system's resolver unless given."""
        self._config = config
        self._flights: SingleFlight[tuple[str, str], bytes] = SingleFlight()
        self._downloader = Downloader(config, look_up=look_up)

    @property
    def cache(self) -> HttpCache:
        return self._downloader.cache

    async def open(self) -> None:
        await self._downloader.open()

    async def close(self) -> None:
        await self._downloader.close()

    async def fetch(self, url: str, *, tenant: str = "") -> bytes:
        """The picture's bytes, at most `max_picture_bytes` of them. Equal URLs of one tenant in flight share one download.

        Raises MediaError: url_invalid, url_blocked, image_fetch_failed, image_fetch_timeout, image_too_large.
        """
        scheme = url[:16].partition(":")[0].lower()
        if scheme == "data":
            return await decode_data_url(url, limit_bytes=self._config.max_picture_bytes)
        if scheme not in ("http", "https", "file"):
            raise MediaError(
                "url_invalid", "the picture's URL must start with http://, https://, data: or, where the server allows it, file://"
            )
        target = parse_url(url)
        if scheme == "file":
            return await asyncio.to_thread(self._read_file, target)
        return await self._flights.run((tenant, url), lambda: self._downloader.download(target, tenant=tenant))

    def _read_file(self, url: URL) -> bytes:
        """Blocks. Links are resolved first, so that one that leads out of the allowed folder is refused."""
        root = self._config.allowed_local_media_path
        if root is None or url.host not in (None, "", "localhost"):
            raise MediaError("url_blocked", "file: pictures are read only from the server's allowed folder (--allowed-local-media-path)")
        path = os.path.realpath(url.path)
        if not Path(path).is_relative_to(os.path.realpath(root)):
            raise MediaError("url_blocked", "the file is not under the server's allowed folder (--allowed-local-media-path)")
        try:
            return _read_regular_file(path, self._config.max_picture_bytes)
        except (OSError, ValueError):
            raise MediaError("image_fetch_failed", "the file cannot be read") from None


def _read_regular_file(path: str, limit_bytes: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise too_many_bytes(limit_bytes)
    return data
