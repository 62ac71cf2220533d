"""The budgets of everything that pictures take up in this process, and what one request holds of them.

A request's holding is a context variable: bytes are counted where they come to be, in tasks that routes start, and none of them can
forget to give them back, because all are given back with the request. Knows nothing of HTTP.
"""

import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

from vision.budget import Budget, Reservation
from vision.config import VisionConfig

FREE_BYTES = 64 << 10  # of a body, of what is kept, of an answer: chats without pictures pass whatever pictures do
DESCRIPTOR_FRACTION = 0.25  # of those that a process may have: requests' pictures, in this process as in the engine
_MANY_DESCRIPTORS = 1 << 16  # where the system sets no limit
BYTES_PER_PIXEL = 3  # RGB; what is kept otherwise counts as so many pixels


class MediaBudgets:
    """One server's."""

    def __init__(self, config: VisionConfig) -> None:
        wait_s = config.budget_wait_s
        # Request bodies, pictures on their way, what was read from the store, large answers: until nobody holds them.
        self.bytes = Budget(
            "media_bytes",
            config.max_media_bytes_in_flight,
            wait_s=wait_s,
            unit="bytes for pictures, bodies and answers (--max-media-bytes-in-flight)",
        )
        # From before decoding until the engine has what became of them.
        self.pixels = Budget("pixels", config.max_pixels_in_flight, wait_s=wait_s, unit="pixels (--max-pixels-in-flight)")
        # Of the arrays of pictures, until the requests that hold them have ended: so long the engine may have to encode them again.
        self.descriptors = Budget("descriptors", _max_descriptors(), wait_s=wait_s, unit="file descriptors for pictures (nofile)")
        self.downloads = Budget("downloads", config.max_downloads, wait_s=wait_s, unit="downloads of pictures")

    def all(self) -> tuple[Budget, ...]:
        return self.bytes, self.pixels, self.descriptors, self.downloads


def _max_descriptors() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, int(DESCRIPTOR_FRACTION * (_MANY_DESCRIPTORS if limit == resource.RLIM_INFINITY else limit)))


class Holding:
    """What one request holds beyond single calls. owner: whose it is, e.g. a key or an address."""

    def __init__(self, budgets: MediaBudgets, owner: str) -> None:
        self.owner = owner
        self.is_admitted = False  # whether one of its prompts was let into the engine's waiting room
        self._budgets = budgets
        self._bytes: list[Reservation] = []
        self._arrays: dict[bytes, ExitStack] = {}  # by the picture's content hash
        self._kept = ExitStack()
        self._is_closed = False

    @property
    def num_bytes(self) -> int:
        """That count for it now."""
        return sum(reservation.asked for reservation in self._bytes)

    async def add_bytes(self, num_bytes: int) -> Reservation:
        """Count bytes until the request ends. The reservation may be changed, by one task at a time. Raises BudgetFullError."""
        reservation = await self._budgets.bytes.reserve(num_bytes, self.owner, continues=True)
        if self._is_closed:
            reservation.release()
        else:
            self._bytes.append(reservation)
        return reservation

    def keep(self, let_go: Callable[[], None]) -> None:
        """Have `let_go` called when the request ends."""
        if self._is_closed:
            let_go()
        else:
            self._kept.callback(let_go)

    def keep_arrays(self, content_hash: bytes, let_go: Callable[[], None]) -> None:
        """Have `let_go` called when the engine has the picture, or the request ends."""
        if self._is_closed:  # work that outlives its request, such as the saving of a turn
            let_go()
        else:
            self._arrays.setdefault(content_hash, ExitStack()).callback(let_go)

    def give_arrays(self, content_hashes: Iterable[bytes]) -> None:
        """The engine has these pictures."""
        for content_hash in content_hashes:
            self._arrays.pop(content_hash, ExitStack()).close()

    def close(self) -> None:
        """Give everything back."""
        self._is_closed = True
        self.give_arrays(tuple(self._arrays))
        self._kept.close()
        for reservation in self._bytes:
            reservation.release()


_HOLDING: ContextVar[Holding | None] = ContextVar("holding", default=None)


@contextmanager
def held_by(holding: Holding) -> Iterator[None]:
    """What is done within, and what that starts, holds for `holding`, which is closed at the end."""
    token = _HOLDING.set(holding)
    try:
        yield
    finally:
        _HOLDING.reset(token)
        holding.close()


def current_holding() -> Holding | None:
    return _HOLDING.get()


def keep_arrays(content_hash: bytes, let_go: Callable[[], None]) -> None:
    """As `Holding.keep_arrays`, for the request of this moment; where there is none, nothing is kept."""
    if holding := current_holding():
        holding.keep_arrays(content_hash, let_go)
    else:
        let_go()


def keep(let_go: Callable[[], None]) -> None:
    """As `Holding.keep`, for the request of this moment; where there is none, nothing is kept."""
    if holding := current_holding():
        holding.keep(let_go)
    else:
        let_go()


async def hold_bytes(num_bytes: int) -> None:
    """As `Holding.add_bytes`, for the request of this moment; nothing where there is none."""
    if holding := current_holding():
        await holding.add_bytes(num_bytes)


async def hold_kept_bytes(num_bytes: int) -> None:
    """As `hold_bytes`, before a conversation of so many bytes is read; a short one is free."""
    if num_bytes > FREE_BYTES:
        await hold_bytes(num_bytes)


def owner_or(tenant: str) -> str:
    """Whose request this moment's is; the tenant where nobody said."""
    holding = current_holding()
    return holding.owner if holding is not None else tenant
