import asyncio

import pytest

from vision.single_flight import SingleFlight


class Work:
    """Waits to be let through; counts its runs."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.num_started = 0
        self.num_cancelled = 0

    async def __call__(self) -> int:
        self.num_started += 1
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return self.num_started


async def started(flights: SingleFlight[str, int], work: Work, num_callers: int) -> list[asyncio.Task[int]]:
    callers = [asyncio.create_task(flights.run("key", work)) for _ in range(num_callers)]
    while work.num_started == 0:  # noqa: ASYNC110
        await asyncio.sleep(0)
    return callers


async def test_callers_of_one_key_share_one_run() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    work = Work()
    callers = await started(flights, work, 5)

    work.may_end.set()

    assert await asyncio.gather(*callers) == [1] * 5
    assert len(flights) == 0


async def test_a_later_call_runs_again() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    work = Work()
    work.may_end.set()

    assert [await flights.run("key", work), await flights.run("key", work)] == [1, 2]


async def test_the_run_survives_all_callers_but_the_last() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    work = Work()
    first, second = await started(flights, work, 2)

    first.cancel()
    await asyncio.wait((first,))
    assert work.num_cancelled == 0
    second.cancel()
    await asyncio.wait((second,))

    await asyncio.sleep(0)
    assert (work.num_cancelled, len(flights)) == (1, 0)


async def test_a_caller_after_the_last_one_left_starts_anew() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    work = Work()
    (first,) = await started(flights, work, 1)
    first.cancel()
    await asyncio.wait((first,))
    work.may_end.set()

    assert await flights.run("key", work) == 2


async def test_every_caller_gets_the_error() -> None:
    flights: SingleFlight[str, int] = SingleFlight()

    async def fail() -> int:
        raise KeyError("no")

    results = await asyncio.gather(flights.run("key", fail), flights.run("key", fail), return_exceptions=True)

    assert [type(result) for result in results] == [KeyError, KeyError]
    with pytest.raises(KeyError):
        await flights.run("key", fail)
