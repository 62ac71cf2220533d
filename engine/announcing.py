"""The server's side of announcing pictures: as each is processed the engine hears of it, while later ones of the prompt are on their way.

Bounded in pictures and bytes; what is beyond the bounds is not announced, and comes with the request as ever. Never waits and never fails:
an announcement is worth a head start and nothing else.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import count

from engine.messages import Announce, Withdraw
from engine.request import EngineError, ImageInput

MAX_PICTURES = 64  # announced at once, by all prompts; each holds a few descriptors of the engine process
MAX_PICTURES_PER_PROMPT = 16
MAX_BYTES = 256 << 20  # of their arrays

Send = Callable[[Announce | Withdraw], Awaitable[None]]


class Announcements:
    """All that are open. One event loop owns it. `send` keeps to the order of its calls, and may raise EngineError.

    A picture that does not go out at once is given up: tried again it might come after its own Withdraw, and be kept for ever.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._numbers = count()
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_pictures = 0
        self.num_bytes = 0

    def open(self) -> "Announcement":
        return Announcement(self, f"announcement-{next(self._numbers)}")

    def has_room_for(self, image: ImageInput) -> bool:
        return self.num_pictures < MAX_PICTURES and self.num_bytes + _num_bytes(image) <= MAX_BYTES

    def send(self, message: Announce | Withdraw) -> None:
        """Soon, in the order of the calls."""
        task = asyncio.get_running_loop().create_task(self._sent(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _sent(self, message: Announce | Withdraw) -> None:
        with contextlib.suppress(EngineError):  # it starts again and has forgotten everything, or takes no picture now
            await self._send(message)


class Announcement:
    """The pictures of one prompt that is being made."""

    def __init__(self, announcements: Announcements, owner: str) -> None:
        self._all = announcements
        self._owner = owner
        self._num_pictures = 0
        self._num_bytes = 0

    def add(self, image: ImageInput) -> None:
        """Announce a picture. Its arrays stay the caller's, who may close them at once."""
        if self._num_pictures >= MAX_PICTURES_PER_PROMPT or not self._all.has_room_for(image):
            return
        self._count(1, _num_bytes(image))
        own = {name: array.duplicate() for name, array in image.arrays.items()}
        self._all.send(Announce(self._owner, replace(image, arrays=own)))  # they are closed with the message

    def end(self, *, request_follows: bool) -> None:
        """The prompt is made and a request brings all its pictures; or it never will be."""
        if self._num_pictures:
            self._all.send(Withdraw(self._owner, request_follows))
        self._count(-self._num_pictures, -self._num_bytes)

    def _count(self, num_pictures: int, num_bytes: int) -> None:
        self._num_pictures += num_pictures
        self._num_bytes += num_bytes
        self._all.num_pictures += num_pictures
        self._all.num_bytes += num_bytes


def _num_bytes(image: ImageInput) -> int:
    return sum(array.num_bytes for array in image.arrays.values())
