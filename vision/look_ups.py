"""The system's resolver beside the event loop: a thread per look-up, at most so many of them, shared fairly.

The system's look-ups cannot be cancelled: one that nobody waits for any more goes on, and keeps its place until its thread ends. Checks no
address.
"""

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from vision.budget import Budget, Reservation
from vision.media_budgets import owner_or

MAX_LOOK_UPS = 64  # threads; those of names whose servers do not answer take the system's timeouts, often 10 to 30 s

Addresses = list[str]


def addresses_of(host: str) -> Addresses:
    """Blocks. Raises OSError where the name has no address, UnicodeError where no name is written so."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [str(socket_address[0]) for *_, socket_address in found]


class LookUps:
    """At most MAX_LOOK_UPS at once, no owner with more than three quarters of them; others wait. One event loop owns it."""

    def __init__(self, look_up: Callable[[str], Addresses] = addresses_of) -> None:
        """look_up: may block for as long as it likes."""
        self._look_up = look_up
        self._places = Budget("look_ups", MAX_LOOK_UPS, wait_s=None)

    @property
    def num_running(self) -> int:
        """Those that were given up included."""
        return self._places.used

    async def addresses(self, host: str) -> Addresses:
        """For the request of this moment; it is the caller who limits the wait. Raises what `look_up` raises, and OSError."""
        place = await self._places.reserve(1, owner_or(""))
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Addresses] = loop.create_future()

        def run() -> None:
            result = self._result(host)
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_end, place, answer, result)

        try:
            threading.Thread(target=run, name="look-up", daemon=True).start()  # a daemon: the process's end does not wait for it
        except RuntimeError as error:  # the system has no more threads
            place.release()
            raise OSError(str(error)) from error
        return await answer

    def _result(self, host: str) -> Addresses | Exception:
        try:
            return self._look_up(host)
        except Exception as error:
            return error


def _end(place: Reservation, answer: asyncio.Future[Addresses], result: Addresses | Exception) -> None:
    place.release()
    if answer.done():  # given up
        return
    if isinstance(result, Exception):
        answer.set_exception(result)
    else:
        answer.set_result(result)
