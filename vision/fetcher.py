"""Brings a picture's bytes from wherever its URL says: http(s):, data:, or file: under one allowed folder.

Every limit holds before the bytes exist. Does not look into the bytes and knows nothing of decoding.
"""

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from yarl import URL

from vision.addresses import LookUp
from vision.budget import Reservation
from vision.config import VisionConfig
from vision.data_url import decode_data_url, too_many_bytes
from vision.download import Claim, Downloader
from vision.http_cache import HttpCache
from vision.image import MediaError
from vision.media_budgets import MediaBudgets, owner_or
from vision.single_flight import SingleFlight
from vision.urls import parse_url

_DOWNLOADS = "downloads"  # the owner of all bytes that come from elsewhere: servers that stall leave room for what needs no download


@dataclass(frozen=True, slots=True)
class _Held:
    data: bytes
    held: Reservation


class Fetcher:
    """One for all pictures. `open()` before use, `close()` after."""

    def __init__(self, config: VisionConfig, budgets: MediaBudgets | None = None, *, look_up: LookUp | None = None) -> None:
        """budgets: of all that this process does; None: of its own. look_up: how host names become addresses; the system's resolver
        unless given.
        """
        self._config = config
        self._budgets = budgets or MediaBudgets(config)
        self._flights: SingleFlight[tuple[str, str], _Held] = SingleFlight()
        self._downloader = Downloader(config, self._budgets.downloads, look_up=look_up)

    @property
    def cache(self) -> HttpCache:
        return self._downloader.cache

    async def open(self) -> None:
        await self._downloader.open()

    async def close(self) -> None:
        await self._downloader.close()

    async def fetch(self, url: str, *, tenant: str = "") -> bytes:
        """As `hold`, for a caller who counts the bytes itself."""
        async with self.hold(url, tenant=tenant) as data:
            return data

    @asynccontextmanager
    async def hold(self, url: str, *, tenant: str = "") -> AsyncIterator[bytes]:
        """The picture's bytes, at most `max_picture_bytes` of them, which count as in flight until the block ends.

        Equal URLs of one tenant in flight share one download, and its bytes count once. Raises MediaError: url_invalid, url_blocked,
        image_fetch_failed, image_fetch_timeout, image_too_large; and BudgetFullError.
        """
        scheme = url[:16].partition(":")[0].lower()
        ways = {"data": self._inline, "file": self._local, "http": self._downloaded, "https": self._downloaded}
        if scheme not in ways:
            raise MediaError(
                "url_invalid", "the picture's URL must start with http://, https://, data: or, where the server allows it, file://"
            )
        async with ways[scheme](url, tenant) as data:
            yield data

    @asynccontextmanager
    async def _inline(self, url: str, tenant: str) -> AsyncIterator[bytes]:
        limit_bytes = self._config.max_picture_bytes
        with await self._budgets.bytes.reserve(min(len(url), limit_bytes), owner_or(tenant)) as held:
            data = await decode_data_url(url, limit_bytes=limit_bytes)
            await held.resize(len(data))
            yield data

    @asynccontextmanager
    async def _local(self, url: str, tenant: str) -> AsyncIterator[bytes]:
        limit_bytes = self._config.max_picture_bytes
        path, num_bytes = await asyncio.to_thread(self._find_file, parse_url(url))
        with await self._budgets.bytes.reserve(min(num_bytes, limit_bytes), owner_or(tenant)) as held:
            data = await asyncio.to_thread(_read_file, path, limit_bytes)
            await held.resize(len(data))
            yield data

    @asynccontextmanager
    async def _downloaded(self, url: str, tenant: str) -> AsyncIterator[bytes]:
        target = parse_url(url)
        download = self._flights.hold((tenant, url), lambda: self._download(target, tenant), let_go=lambda found: found.held.release())
        async with download as found:
            yield found.data

    async def _download(self, url: URL, tenant: str) -> _Held:
        owner = owner_or(tenant)
        held = await self._budgets.bytes.reserve(0, owner, f"host {url.raw_host}", _DOWNLOADS)
        try:
            data = await self._downloader.download(url, Claim(tenant, owner, held))
            await held.resize(len(data))  # also of a picture that was kept from before
        except BaseException:
            held.release()
            raise
        return _Held(data, held)

    def _find_file(self, url: URL) -> tuple[str, int]:
        """Where it is, and its size, 0 where that cannot be told. Blocks. Raises MediaError url_blocked.

        Links are resolved first, so that one that leads out of the allowed folder is refused.
        """
        root = self._config.allowed_local_media_path
        if root is None or url.host not in (None, "", "localhost"):
            raise MediaError("url_blocked", "file: pictures are read only from the server's allowed folder (--allowed-local-media-path)")
        path = os.path.realpath(url.path)
        if not Path(path).is_relative_to(os.path.realpath(root)):
            raise MediaError("url_blocked", "the file is not under the server's allowed folder (--allowed-local-media-path)")
        try:
            return path, os.stat(path).st_size
        except (OSError, ValueError):
            return path, 0


def _read_file(path: str, limit_bytes: int) -> bytes:
    """Blocks."""
    try:
        return _read_regular_file(path, limit_bytes)
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
