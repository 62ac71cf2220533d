"""What one key may use per minute: buckets that hold a minute's worth and fill continuously, counted in whole numbers.

A request takes one of its bucket to begin. Of tokens and pixels there must be one left, and it is charged what it uses while it uses it:
none is cut off, and what it takes beyond the bucket is a debt that later ones wait for. Knows nothing of HTTP, of keys or of files.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

REQUESTS, TOKENS, PIXELS = "requests", "tokens", "megapixels"
PIXELS_PER_MEGAPIXEL = 1_000_000

_NS_PER_S = 1_000_000_000
_NS_PER_MINUTE = 60 * _NS_PER_S


@dataclass(frozen=True, slots=True)
class Limits:
    """Per minute; None: as much as the server can. Pixels are width × height, summed over pictures."""

    requests: int | None = None
    tokens: int | None = None
    pixels: int | None = None

    def by_kind(self) -> dict[str, int]:
        """Those that there are."""
        limits = {REQUESTS: self.requests, TOKENS: self.tokens, PIXELS: self.pixels}
        return {kind: limit for kind, limit in limits.items() if limit is not None}


UNLIMITED = Limits()


class QuotaExceededError(Exception):
    """A request that may not begin. After `retry_after_s` seconds it may, unless other requests of the key use what comes in."""

    def __init__(self, owner: str, kind: str, limit: int, retry_after_s: int) -> None:
        quota = f"{shown(kind, limit)} {kind} per minute"
        super().__init__(f"the quota of the key {owner!r}, {quota}, is used up; try again in {retry_after_s} s")
        self.owner = owner
        self.kind = kind
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Standing:
    """How one kind of use stands. remaining: 0 also where it is owed. reset_ns: until the bucket is full."""

    limit: int
    remaining: int
    reset_ns: int


class Bucket:
    """Fills by `per_minute` units a minute, up to `per_minute`; may owe.

    The level is kept in units of 1/60e9, of which `per_minute` come in each nanosecond: all sums are of integers and exact.
    """

    def __init__(self, per_minute: int, now_ns: int) -> None:
        self.per_minute = per_minute
        self._level = self._capacity
        self._at_ns = now_ns

    def take(self, amount: int, now_ns: int) -> None:
        """More than there is leaves a debt."""
        self._fill(now_ns)
        self._level -= amount * _NS_PER_MINUTE

    def give_back(self, amount: int, now_ns: int) -> None:
        self._fill(now_ns)
        self._level = min(self._capacity, self._level + amount * _NS_PER_MINUTE)

    def wait_ns(self, amount: int, now_ns: int) -> int:
        """Until `amount` is there; 0: it is."""
        self._fill(now_ns)
        return max(0, -((self._level - amount * _NS_PER_MINUTE) // self.per_minute))

    def standing(self, now_ns: int) -> Standing:
        reset_ns = self.wait_ns(self.per_minute, now_ns)
        return Standing(self.per_minute, max(0, self._level // _NS_PER_MINUTE), reset_ns)

    def change(self, per_minute: int, now_ns: int) -> None:
        """Another limit from now on; what is owed stays owed, and nothing is given."""
        self._fill(now_ns)
        self.per_minute = per_minute
        self._level = min(self._level, self._capacity)

    @property
    def _capacity(self) -> int:
        return self.per_minute * _NS_PER_MINUTE

    def _fill(self, now_ns: int) -> None:
        elapsed_ns = max(0, now_ns - self._at_ns)
        self._level = min(self._capacity, self._level + elapsed_ns * self.per_minute)
        self._at_ns = max(now_ns, self._at_ns)


class Quota:
    """One key's buckets. To be used in one thread."""

    def __init__(
        self,
        limits: Limits,
        *,
        owner: str,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        on_refused: Callable[[str, str], None] = lambda owner, kind: None,
    ) -> None:
        """owner: the key's name, for messages. on_refused: is told owner and kind of every refusal."""
        self._owner = owner
        self._clock_ns = clock_ns
        self._on_refused = on_refused
        self._buckets: dict[str, Bucket] = {}
        self._known: dict[str, Bucket] = {}  # those too whose kind has no limit for now: what is owed stays owed
        self.change(limits)

    @property
    def is_limited(self) -> bool:
        return bool(self._buckets)

    def change(self, limits: Limits) -> None:
        """Other limits from now on; what is used is kept in mind."""
        now_ns, by_kind = self._clock_ns(), limits.by_kind()
        for kind, limit in by_kind.items():
            self._known.setdefault(kind, Bucket(limit, now_ns)).change(limit, now_ns)
        self._buckets = {kind: self._known[kind] for kind in by_kind}

    def admit(self, *kinds: str) -> None:
        """Raises QuotaExceededError where there is nothing left of one of `kinds`, and names the one that takes longest to come back."""
        now_ns = self._clock_ns()
        waits = {kind: self._buckets[kind].wait_ns(1, now_ns) for kind in kinds if kind in self._buckets}
        kind = max(waits, key=waits.__getitem__, default="")
        if kind and waits[kind]:
            self._on_refused(self._owner, kind)
            raise QuotaExceededError(self._owner, kind, self._buckets[kind].per_minute, math.ceil(waits[kind] / _NS_PER_S))

    def take(self, kind: str, amount: int) -> None:
        if bucket := self._buckets.get(kind):
            bucket.take(amount, self._clock_ns())

    def give_back(self, kind: str, amount: int) -> None:
        if bucket := self._buckets.get(kind):
            bucket.give_back(amount, self._clock_ns())

    def standings(self) -> dict[str, Standing]:
        """Of the kinds that have a limit."""
        now_ns = self._clock_ns()
        return {kind: bucket.standing(now_ns) for kind, bucket in self._buckets.items()}


def shown(kind: str, amount: int) -> str:
    """Whole numbers; megapixels with as many decimals as they have."""
    return f"{amount / PIXELS_PER_MEGAPIXEL:.6f}".rstrip("0").rstrip(".") if kind == PIXELS else str(amount)
