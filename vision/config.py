"""The limits of the vision package. Knows nothing of HTTP routes; reads nothing but what it is given."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_PICTURE_PIXELS = 50_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """One server's limits. A limit is never switched off, only set."""

    max_picture_bytes: int = 20 << 20  # as sent, before decoding
    max_picture_pixels: int = MAX_PICTURE_PIXELS  # width × height as its header says
    max_request_picture_bytes: int = 128 << 20  # of all pictures of one request, as sent
    max_request_pixels: int = 500_000_000  # of all pictures of one request, cached ones too

    max_media_bytes_in_flight: int = 1 << 30  # of all requests: bodies, downloads, files, until nobody holds them; more wait
    max_pixels_in_flight: int = 512_000_000  # of all requests: decoded, and not taken over by the engine; 3 bytes each; more wait
    max_downloads: int = 256  # at once; more wait
    max_pictures_per_request_in_flight: int = 16  # between their URL and their processed arrays; more wait for those before them
    budget_wait_s: float = 2.0  # for which a request waits for any of these before it is refused

    max_redirects: int = 3
    connect_timeout_s: float = 5.0  # name look-up, TCP and TLS
    first_byte_timeout_s: float = 10.0  # also the longest pause between two bytes
    fetch_timeout_s: float = 30.0  # all of it, redirects included
    min_download_bytes_per_s: float = 1024.0  # on average, after a few seconds; slower ones are given up
    max_downloads_per_host: int = 16  # at once; more wait
    max_download_retries: int = 2  # of a hop whose failure may pass
    retry_pause_s: float = 0.1  # before the first of them; then twice as long, each with jitter
    download_cache_bytes: int = 64 << 20  # pictures that HTTP lets us use again
    allowed_media_domains: tuple[str, ...] = ()  # the only hosts to fetch from, `*.` before one: all under it; none: all
    media_proxy: str | None = None  # http://host:port; None: directly, whatever the environment says
    user_agent: str = "vlm-server/0.1 (+picture fetcher)"  # some sites refuse clients that name none
    allowed_local_media_path: str | None = None  # the one folder that file: URLs may name; None: file: is refused
    allow_private_media: tuple[str, ...] = ()  # CIDRs of non-global addresses that may be dialled

    num_decode_workers: int = 2
    decode_memory_bytes: int = 1 << 30  # per worker, beyond what it holds when idle
    decode_timeout_s: float = 10.0  # per picture; also its limit of CPU seconds
    num_preprocess_workers: int = 1
    preprocess_timeout_s: float = 60.0
    worker_start_timeout_s: float = 120.0  # a preprocessing worker loads torch and the model's processor

    processed_cache_bytes: int = 256 << 20
    processed_cache_pictures: int = 512  # each holds a few descriptors of this process

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in _ABOVE_ZERO:
            self._require(name, getattr(self, name) > 0, "above 0 seconds")
        for name in _NOT_NEGATIVE:
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("decode_memory_bytes", self.decode_memory_bytes >= 64 << 20, "at least 64 MiB")
        root = self.allowed_local_media_path
        self._require("allowed_local_media_path", root is None or Path(root).is_dir(), "an existing folder")
        _ = self.private_networks
        is_name = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*|[0-9a-f:.]+").fullmatch
        names = self.allowed_media_domains
        self._require("allowed_media_domains", all(map(is_name, names)), "host names in lower case, as example.org or *.example.org")
        proxy = self.media_proxy
        self._require("media_proxy", proxy is None or bool(re.match(r"https?://[^/@]", proxy)), "http://host:port")

    @property
    def private_networks(self) -> tuple[IPNetwork, ...]:
        """`allow_private_media`, parsed."""
        try:
            return tuple(ipaddress.ip_network(cidr, strict=False) for cidr in self.allow_private_media)
        except ValueError as error:
            raise ValueError(f"allow_private_media: {error}; only CIDRs such as 10.0.0.0/8 or fd00::/8 are allowed") from None

    def _require(self, name: str, is_valid: bool, allowed: str) -> None:
        if not is_valid:
            raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed, only {allowed}")


_AT_LEAST_ONE = (
    "max_picture_bytes",
    "max_picture_pixels",
    "max_request_picture_bytes",
    "max_request_pixels",
    "max_media_bytes_in_flight",
    "max_pixels_in_flight",
    "max_downloads",
    "max_pictures_per_request_in_flight",
    "max_downloads_per_host",
    "num_decode_workers",
    "num_preprocess_workers",
)
_ABOVE_ZERO = (
    "connect_timeout_s",
    "first_byte_timeout_s",
    "fetch_timeout_s",
    "decode_timeout_s",
    "preprocess_timeout_s",
    "worker_start_timeout_s",
)
_NOT_NEGATIVE = (
    "max_redirects",
    "min_download_bytes_per_s",
    "max_download_retries",
    "retry_pause_s",
    "budget_wait_s",
    "download_cache_bytes",
    "processed_cache_bytes",
    "processed_cache_pictures",
)
