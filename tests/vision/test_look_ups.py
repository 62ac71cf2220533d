"""Names whose servers do not answer, and those who wait for others."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.vision.processes import python_prints, until
from vision.budget import Budget
from vision.config import VisionConfig
from vision.fetcher import Fetcher
from vision.image import MediaError
from vision.look_ups import MAX_LOOK_UPS, LookUps
from vision.media_budgets import Holding, MediaBudgets, held_by

SHARE = Budget("", MAX_LOOK_UPS, wait_s=None).share  # of one owner


class Names:
    """A resolver that answers for dead names, in vain, only when a test lets it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.gives_up = threading.Event()

    def look_up(self, host: str) -> list[str]:
        self.asked.append(host)
        if host.startswith("dead"):
            self.gives_up.wait(20)
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return ["192.0.2.1"]

    def getaddrinfo(self, host: str, *words: Any, **named: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in self.look_up(host)]


@pytest.fixture
def names() -> Iterator[Names]:
    names = Names()
    yield names
    names.gives_up.set()


async def asked_by(owner: str, look_ups: LookUps, host: str) -> list[str]:
    with held_by(Holding(MediaBudgets(VisionConfig()), owner)):
        return await look_ups.addresses(host)


def ask_dead(look_ups: LookUps, number: int) -> list["asyncio.Task[list[str]]"]:
    return [asyncio.create_task(asked_by("a", look_ups, f"dead{at}.example")) for at in range(number)]


async def give_up(tasks: list["asyncio.Task[list[str]]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_names_are_looked_up_and_errors_are_the_systems(names: Names) -> None:
    look_ups = LookUps(names.look_up)
    names.gives_up.set()

    assert await look_ups.addresses("a.example") == ["192.0.2.1"]
    with pytest.raises(socket.gaierror, match="no answer"):
        await look_ups.addresses("dead.example")
    assert look_ups.num_running == 0


async def test_dead_names_of_one_owner_leave_places_for_others(names: Names) -> None:
    look_ups = LookUps(names.look_up)
    dead = ask_dead(look_ups, MAX_LOOK_UPS)
    await until(lambda: look_ups.num_running == SHARE)

    async with asyncio.timeout(20):
        answers = await asyncio.gather(*(asked_by("b", look_ups, "b.example") for _ in range(30)))

    assert answers == [["192.0.2.1"]] * 30
    assert len(names.asked) == SHARE + 30
    await give_up(dead)


async def test_a_look_up_that_was_given_up_keeps_its_place_until_its_thread_ends(names: Names) -> None:
    look_ups = LookUps(names.look_up)
    dead = ask_dead(look_ups, SHARE)
    await until(lambda: len(names.asked) == SHARE)

    await give_up(dead)
    waiting = asyncio.create_task(asked_by("a", look_ups, "a.example"))
    other = await asked_by("b", look_ups, "b.example")

    assert (other, look_ups.num_running, "a.example" in names.asked) == (["192.0.2.1"], SHARE, False)
    names.gives_up.set()
    assert await waiting == ["192.0.2.1"]
    await until(lambda: look_ups.num_running == 0)


async def test_who_waits_for_a_place_and_is_given_up_is_never_looked_up(names: Names) -> None:
    look_ups = LookUps(names.look_up)
    dead = ask_dead(look_ups, SHARE + 1)
    await until(lambda: len(names.asked) == SHARE)

    await give_up(dead)
    names.gives_up.set()
    await until(lambda: look_ups.num_running == 0)

    assert len(names.asked) == SHARE


async def test_a_system_without_threads_to_spare_is_a_failed_look_up(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    look_ups = LookUps(names.look_up)
    monkeypatch.setattr(threading.Thread, "start", start)

    with pytest.raises(OSError, match="new thread"):
        await look_ups.addresses("a.example")
    assert look_ups.num_running == 0


async def test_dead_names_of_one_request_do_not_delay_the_pictures_of_another(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", names.getaddrinfo)
    fetcher = Fetcher(VisionConfig(connect_timeout_s=10))
    await fetcher.open()

    async def fetch(owner: str, host: str) -> bytes:
        with held_by(Holding(MediaBudgets(VisionConfig()), owner)):
            return await fetcher.fetch(f"http://{host}/")

    dead = [asyncio.create_task(fetch("a", f"dead{at}.example")) for at in range(100)]
    await until(lambda: bool(names.asked))

    with pytest.raises(MediaError) as caught:  # which the address is, once it is known
        await fetch("b", "b.example")

    assert caught.value.code == "url_blocked"
    assert not any(task.done() for task in dead)
    names.gives_up.set()
    for task in dead:
        task.cancel()
    await asyncio.wait(dead)
    await fetcher.close()


async def test_who_finds_no_place_in_time_is_told_so(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", names.getaddrinfo)
    fetcher = Fetcher(VisionConfig(connect_timeout_s=0.2, max_downloads=1000))
    await fetcher.open()
    fetches = (fetcher.fetch(f"http://dead{at}.example/") for at in range(MAX_LOOK_UPS + 10))

    results = await asyncio.gather(*fetches, return_exceptions=True)

    assert {error.code for error in results if isinstance(error, MediaError)} == {"image_fetch_timeout"}
    await until(lambda: len(names.asked) == MAX_LOOK_UPS)
    await fetcher.close()


def test_a_process_ends_while_a_name_is_looked_up() -> None:
    program = """
import asyncio, threading
from vision.look_ups import LookUps

async def main():
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def look_up(host):
        loop.call_soon_threadsafe(asked.set)
        threading.Event().wait()

    task = asyncio.create_task(LookUps(look_up).addresses("dead.example"))
    await asked.wait()
    task.cancel()

asyncio.run(main())
print("left")
"""

    assert python_prints(program) == "left"


def test_an_answer_that_comes_after_the_loop_was_closed_is_dropped(names: Names) -> None:
    async def ask() -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(0):
                await LookUps(names.look_up).addresses("dead.example")

    asyncio.run(ask())
    threads = [thread for thread in threading.enumerate() if thread.name == "look-up"]

    names.gives_up.set()
    for thread in threads:
        thread.join(60)

    assert threads
    assert not any(thread.is_alive() for thread in threads)
