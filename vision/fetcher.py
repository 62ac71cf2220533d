"""Brings a picture's bytes from wherever its URL says: http(s):, data:, or file: under one allowed folder.

Every limit holds before the bytes exist. Does not look into the bytes, knows nothing of decoding and caches nothing.
"""

import asyncio
import os
import stat
import zlib
from pathlib import Path

import aiohttp
from yarl import URL

from vision.addresses import AddressPolicy, BlockedAddressError, CheckedResolver, LookUp
from vision.config import VisionConfig
from vision.data_url import decode_data_url, too_many_bytes
from vision.image import MediaError
from vision.single_flight import SingleFlight

_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK_BYTES = 64 << 10
_PLAIN = ("", "identity")
_ZLIB = ("gzip", "x-gzip", "deflate")
_HEADERS = {"Accept": "image/*, */*;q=0.5", "Accept-Encoding": "identity"}


class Fetcher:
    """One HTTP client for all pictures. `open()` before use, `close()` after."""

    def __init__(self, config: VisionConfig, *, look_up: LookUp | None = None) -> None:
        """`look_up`: how host names become addresses; the system's resolver unless given."""
        self._config = config
        self._policy = AddressPolicy(config.private_networks)
        self._look_up = look_up
        self._flights: SingleFlight[tuple[str, str], bytes] = SingleFlight()
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        config = self._config
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=CheckedResolver(self._policy, self._look_up), use_dns_cache=False, limit=0),
            timeout=aiohttp.ClientTimeout(total=None, connect=config.connect_timeout_s, sock_read=config.first_byte_timeout_s),
            headers=_HEADERS | {"User-Agent": config.user_agent},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

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
        target = _parse(url)
        if scheme == "file":
            return await asyncio.to_thread(self._read_file, target)
        return await self._flights.run((tenant, url), lambda: self._download(target))

    async def _download(self, url: URL) -> bytes:
        try:
            async with asyncio.timeout(self._config.fetch_timeout_s):
                return await self._follow(url)
        except TimeoutError:  # aiohttp's own timeouts are among these
            raise MediaError("image_fetch_timeout", "the picture's server took too long to send it") from None
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
            raise MediaError("url_invalid", "the picture's URL is not valid") from None
        except (aiohttp.ClientError, OSError, zlib.error) as error:
            raise _unreachable(error) from None

    async def _follow(self, url: URL) -> bytes:
        """Follows redirects by hand: each hop is checked as the first one is."""
        assert self._session is not None, "the fetcher is not open"
        for _ in range(self._config.max_redirects + 1):
            self._policy.check_host(url.raw_host or "")
            async with self._session.get(url, allow_redirects=False) as response:
                if response.status not in _REDIRECTS:
                    return await self._read(response)
                url = _redirected(url, response.headers.get("Location", ""))
        raise MediaError("image_fetch_failed", f"the picture's URL redirects more than {self._config.max_redirects} times")

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        if response.status != 200:
            raise MediaError("image_fetch_failed", f"the picture's server answered with status {response.status}")
        body = _CappedBody(self._config.max_picture_bytes, response.headers.get("Content-Encoding", "").strip().lower())
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            body.append(chunk)
        if not body.is_complete:
            raise MediaError("image_fetch_failed", "the picture's server broke off")
        return bytes(body.data)

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


class _CappedBody:
    """Collects a body and refuses it as soon as it is too large, sent compressed or not."""

    def __init__(self, limit_bytes: int, encoding: str) -> None:
        """Some servers compress everything, although we ask for nothing compressed. Raises MediaError for what zlib does not read."""
        if encoding not in _PLAIN + _ZLIB:
            raise MediaError("image_fetch_failed", "the picture's server sent it in a compression that was not asked for")
        self.data = bytearray()
        self._limit_bytes = limit_bytes
        self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 32) if encoding in _ZLIB else None  # 32: a gzip or a zlib header

    @property
    def is_complete(self) -> bool:
        return self._zlib is None or self._zlib.eof

    def append(self, chunk: bytes) -> None:
        room_bytes = self._limit_bytes - len(self.data) + 1
        self.data += chunk[:room_bytes] if self._zlib is None else self._zlib.decompress(chunk, room_bytes)
        if len(self.data) > self._limit_bytes:
            raise too_many_bytes(self._limit_bytes)


def _parse(url: str) -> URL:
    """With the parser of the client that dials, so that no two parsers can disagree. Raises url_invalid."""
    if "\\" in url or any(ord(letter) < 0x20 or letter == "\x7f" for letter in url):
        raise MediaError("url_invalid", "the picture's URL holds a backslash or a control character")
    try:
        parsed = _as_written(url)
        is_valid = parsed.port != 0 and "\0" not in parsed.path and (parsed.scheme == "file" or bool(parsed.raw_host))
    except ValueError:
        is_valid = False
    if not is_valid:
        raise MediaError("url_invalid", "the picture's URL is not valid")
    return parsed


def _redirected(url: URL, location: str) -> URL:
    try:
        target = str(url.join(_as_written(location)))
    except ValueError:
        raise MediaError("image_fetch_failed", "the picture's server redirects to an invalid URL") from None
    if not target.startswith(("http://", "https://")):
        raise MediaError("url_blocked", "the picture's server redirects to something that is not http or https")
    return _parse(target)


def _as_written(url: str) -> URL:
    """Without quoting anew what was signed as it is, unless it holds letters that no URL can."""
    return URL(url, encoded=url.isascii() and " " not in url)


def _unreachable(error: Exception) -> MediaError:
    if isinstance(error, BlockedAddressError) or isinstance(error.__cause__, BlockedAddressError):  # the latter from the resolver
        return MediaError("url_blocked", "the picture's URL leads to an address that is not fetched from (--allow-private-media)")
    return MediaError("image_fetch_failed", "the picture's server could not be found or reached, or broke off")


def _read_regular_file(path: str, limit_bytes: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise too_many_bytes(limit_bytes)
    return data
