"""Pictures that were downloaded before, for as long as HTTP lets them be used again (RFC 9111, as a private cache per tenant).

Nothing stale is ever used, and nothing is guessed: a picture to which its server gave no lifetime is asked for again, under its validators.
Dials nothing.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime

from multidict import MultiMapping

from vision.cache import ByteBoundedCache

MAX_LIFETIME_S = 86400.0  # whatever a server says
_OVERHEAD_BYTES = 1 << 10  # of an entry beside its data and texts, generously

Key = tuple[str, str]  # tenant, URL
Headers = MultiMapping[str]  # by name in any case


@dataclass(frozen=True, slots=True)
class StoredPicture:
    """A picture's bytes, what they can be revalidated with, and until when they need not be."""

    data: bytes
    etag: str | None
    last_modified: str | None
    fresh_until_s: float  # on the cache's clock

    @property
    def conditions(self) -> dict[str, str]:
        """Headers of a request that is answered with 304 where nothing changed."""
        found = {"If-None-Match": self.etag, "If-Modified-Since": self.last_modified}
        return {name: value for name, value in found.items() if value}


class HttpCache:
    """At most `capacity_bytes` of pictures."""

    def __init__(self, capacity_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds, never going back."""
        self._pictures: ByteBoundedCache[Key, StoredPicture] = ByteBoundedCache(capacity_bytes)
        self._clock = clock
        self.num_fresh = 0  # used without a request
        self.num_revalidated = 0  # used after a 304
        self.num_missed = 0  # downloaded whole

    @property
    def num_bytes(self) -> int:
        return self._pictures.num_bytes

    def now_s(self) -> float:
        return self._clock()

    def fresh(self, key: Key) -> bytes | None:
        """A picture that may be used as it is."""
        stored = self._pictures.get(key)
        if stored is None or stored.fresh_until_s <= self._clock():
            return None
        self.num_fresh += 1
        return stored.data

    def stored(self, key: Key) -> StoredPicture | None:
        """A picture to be asked for under its conditions."""
        return self._pictures.get(key)

    def put(self, key: Key, data: bytes, headers: Headers, *, asked_s: float) -> None:
        """Keeps a 200's picture where its headers allow that and it will be of use. asked_s: when it was asked for, by `now_s`."""
        self.num_missed += 1
        stored = _storable(data, headers, asked_s)
        if stored is None:
            self._pictures.discard(key)
        else:
            self._keep(key, stored)

    def revalidated(self, key: Key, stored: StoredPicture, headers: Headers, *, asked_s: float) -> bytes:
        """The picture after a 304, whose headers replace those of before."""
        self.num_revalidated += 1
        renewed = _storable(stored.data, headers, asked_s)
        if _is_forbidden(headers):
            self._pictures.discard(key)
        elif renewed is not None:
            kept = replace(renewed, etag=renewed.etag or stored.etag, last_modified=renewed.last_modified or stored.last_modified)
            self._keep(key, kept)
        return stored.data

    def clear(self) -> None:
        self._pictures.clear()

    def _keep(self, key: Key, picture: StoredPicture) -> None:
        texts = sum(sys.getsizeof(text) for text in (*key, *picture.conditions.values()))
        self._pictures.put(key, picture, len(picture.data) + texts + _OVERHEAD_BYTES)


def _storable(data: bytes, headers: Headers, asked_s: float) -> StoredPicture | None:
    if _is_forbidden(headers):
        return None
    directives = _directives(headers)
    lifetime_s = 0.0 if "no-cache" in directives else min(_lifetime_s(directives, headers), MAX_LIFETIME_S)
    stored = StoredPicture(data, headers.get("ETag"), headers.get("Last-Modified"), asked_s + lifetime_s)
    return stored if lifetime_s > 0 or stored.conditions else None


def _is_forbidden(headers: Headers) -> bool:
    return "no-store" in _directives(headers) or "*" in _listed(headers, "Vary")


def _directives(headers: Headers) -> dict[str, str]:
    """`Cache-Control: max-age=60, no-transform` as name → value."""
    parts = (part.partition("=") for part in _listed(headers, "Cache-Control"))
    return {name.strip().lower(): value.strip().strip('"') for name, _, value in parts if name}


def _listed(headers: Headers, name: str) -> list[str]:
    """Of all lines of that name: a proxy may have added its own."""
    return [part.strip() for line in headers.getall(name, ()) for part in line.split(",")]


def _lifetime_s(directives: Mapping[str, str], headers: Headers) -> float:
    """Seconds for which the server calls its answer fresh, less those that it spent in caches before us."""
    if "max-age" in directives:
        lifetime_s = _number(directives["max-age"])
    elif "Expires" in headers:
        lifetime_s = _seconds_between(headers.get("Date", ""), headers["Expires"])
    else:
        return 0.0
    return max(lifetime_s - _number(headers.get("Age", "")), 0.0)


def _number(text: str) -> float:
    return float(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0.0


def _seconds_between(earlier: str, later: str) -> float:
    """0 where either is no date: `Expires: 0` means expired."""
    try:
        return (parsedate_to_datetime(later) - parsedate_to_datetime(earlier)).total_seconds()
    except (ValueError, TypeError):
        return 0.0
