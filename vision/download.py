"""Downloads over http and https: every hop's host and address are checked, every wait is bounded, what failed in passing is tried again.

Pictures that HTTP lets us keep are used again. Knows nothing of other schemes; does not look into the bytes.
"""

import asyncio
import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp
from yarl import URL

from vision.addresses import AddressPolicy, BlockedAddressError, CheckedResolver, DomainPolicy, LookUp
from vision.body import CappedBody
from vision.budget import Budget, Reservation
from vision.config import VisionConfig
from vision.connector import Connector
from vision.host_slots import HostSlots
from vision.http_cache import HttpCache
from vision.image import MediaError
from vision.look_ups import LookUps
from vision.urls import redirected

_REDIRECTS = (301, 302, 303, 307, 308)
_PASSING = (429, 502, 503, 504)  # a server's answers that may be another in a moment
_CHUNK_BYTES = 64 << 10
_HEADERS = {"Accept": "image/*, */*;q=0.5", "Accept-Encoding": "identity"}
_MAX_PAUSE_S = 2.0  # a server that wants a longer one is not asked again


class _PassingError(Exception):
    """What may succeed when it is tried again after `pause_s`, and the error where it does not."""

    def __init__(self, error: MediaError, pause_s: float = 0.0) -> None:
        super().__init__(error.message)
        self.error = error
        self.pause_s = pause_s


@dataclass(frozen=True, slots=True)
class Claim:
    """For whom a download runs. tenant: whose cached pictures it may use. owner: whose share of all downloads it takes.

    held: what counts its bytes as they arrive, whatever length was declared.
    """

    tenant: str
    owner: str
    held: Reservation


class Downloader:
    """One HTTP client for all pictures. `open()` before use, `close()` after."""

    def __init__(self, config: VisionConfig, downloads: Budget, *, look_up: LookUp | None = None) -> None:
        """downloads: how many may run. look_up: how host names become addresses; the system's resolver unless given."""
        self._config = config
        self._downloads = downloads
        self._policy = AddressPolicy(config.private_networks)
        self._domains = DomainPolicy(config.allowed_media_domains)
        self._resolver = CheckedResolver(self._policy, look_up or LookUps().addresses)
        self._hosts = HostSlots(config.max_downloads_per_host)
        self._session: aiohttp.ClientSession | None = None
        self.cache = HttpCache(config.download_cache_bytes)

    async def open(self) -> None:
        config = self._config
        through_proxy = config.media_proxy is not None  # then nothing but the proxy is dialled
        resolver = aiohttp.ThreadedResolver() if through_proxy else self._resolver
        self._session = aiohttp.ClientSession(
            connector=Connector(resolver=resolver, use_dns_cache=False, limit=0),
            timeout=aiohttp.ClientTimeout(total=None, connect=config.connect_timeout_s, sock_read=config.first_byte_timeout_s),
            headers=_HEADERS | {"User-Agent": config.user_agent},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )

    async def close(self) -> None:
        self.cache.clear()
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def download(self, url: URL, claim: Claim) -> bytes:
        """The picture's bytes, at most `max_picture_bytes`. Raises MediaError, and BudgetFullError where others leave no room for it."""
        try:
            async with asyncio.timeout(self._config.fetch_timeout_s):
                return await self._follow(url, claim)
        except TimeoutError:  # aiohttp's own timeouts are among these
            raise MediaError("image_fetch_timeout", "the picture's server took too long to send it") from None
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, UnicodeError):  # the last one of a host that no name server could know
            raise MediaError("url_invalid", "the picture's URL is not valid") from None
        except (aiohttp.ClientError, OSError, zlib.error) as error:
            raise _unreachable(error) from None

    async def _follow(self, url: URL, claim: Claim) -> bytes:
        """Follows redirects by hand: each hop is checked as the first one is."""
        for _ in range(self._config.max_redirects + 1):
            found = await self._patiently(url, claim)
            if isinstance(found, bytes):
                return found
            url = found
        raise MediaError("image_fetch_failed", f"the picture's URL redirects more than {self._config.max_redirects} times")

    async def _patiently(self, url: URL, claim: Claim) -> bytes | URL:
        """One hop, tried again where its failure may pass. The pauses grow, and differ, so that many clients do not come back as one."""
        for attempt in range(self._config.max_download_retries + 1):
            try:
                return await self._hop(url, claim)
            except _PassingError as passing:
                if attempt == self._config.max_download_retries or passing.pause_s > _MAX_PAUSE_S:
                    raise passing.error from None
                growing_s = self._config.retry_pause_s * 2**attempt * random.uniform(0.5, 1.5)
                await asyncio.sleep(max(passing.pause_s, growing_s))
        raise AssertionError("the last attempt returned or raised")

    async def _hop(self, url: URL, claim: Claim) -> bytes | URL:
        """The picture at a URL, or where it redirects to."""
        host = url.raw_host or ""
        self._check_host(host)
        key = claim.tenant, str(url)
        fresh = self.cache.fresh(key)
        if fresh is not None:
            return fresh
        async with self._hosts.hold(host, owner=claim.owner):
            if self._config.media_proxy is not None:
                await self._check_for_proxy(host)
            try:
                with await self._downloads.reserve(1, claim.owner):
                    return await self._ask(url, key, claim.held)
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
                if isinstance(error, TimeoutError):
                    raise
                failure = _unreachable(error)
                if failure.code == "url_blocked":
                    raise failure from None
                raise _PassingError(failure) from None

    async def _ask(self, url: URL, key: tuple[str, str], held: Reservation) -> bytes | URL:
        assert self._session is not None, "the downloader is not open"
        stored = self.cache.stored(key)
        conditions = stored.conditions if stored is not None else {}
        asked_s = self.cache.now_s()
        async with self._session.get(url, allow_redirects=False, headers=conditions, proxy=self._config.media_proxy) as response:
            if response.status in _REDIRECTS:
                return redirected(url, response.headers.get("Location", ""))
            if response.status == 304 and stored is not None and conditions:
                return self.cache.revalidated(key, stored, response.headers, asked_s=asked_s)
            data = await self._read(response, held)
            self.cache.put(key, data, response.headers, asked_s=asked_s)
            return data

    async def _read(self, response: aiohttp.ClientResponse, held: Reservation) -> bytes:
        if response.status != 200:
            error = MediaError("image_fetch_failed", f"the picture's server answered with status {response.status}")
            raise _PassingError(error, _wanted_pause_s(response.headers)) if response.status in _PASSING else error
        config = self._config
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        body = CappedBody(config.max_picture_bytes, encoding, min_bytes_per_s=config.min_download_bytes_per_s)
        await held.resize(0)  # what an earlier attempt left
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            if body.is_compressed:
                await asyncio.to_thread(body.append, chunk)
            else:
                body.append(chunk)
            await held.resize(len(body.data))
        if not body.is_complete:
            raise MediaError("image_fetch_failed", "the picture's server broke off")
        return bytes(body.data)

    def _check_host(self, host: str) -> None:
        if not self._domains.permits(host):
            message = "the picture's URL leads to a host that is not among those that this server fetches from (--allowed-media-domains)"
            raise MediaError("url_blocked", message)
        self._policy.check_host(host)

    async def _check_for_proxy(self, host: str) -> None:
        """Refuses names that lead to refused addresses, as far as we can see here. What a proxy dials is the proxy's to limit."""
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                await self._resolver.resolve(host)
        except BlockedAddressError:
            raise
        except (OSError, TimeoutError):  # networks with a proxy often resolve no public names
            return


def _wanted_pause_s(headers: Mapping[str, str]) -> float:
    value = headers.get("Retry-After", "")
    return float(value) if value.isascii() and value.isdigit() and len(value) < 10 else 0.0


def _unreachable(error: Exception) -> MediaError:
    if isinstance(error, BlockedAddressError) or isinstance(error.__cause__, BlockedAddressError):  # the latter from the resolver
        return MediaError("url_blocked", "the picture's URL leads to an address that is not fetched from (--allow-private-media)")
    return MediaError("image_fetch_failed", "the picture's server could not be found or reached, or broke off")
