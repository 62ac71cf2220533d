"""Work that is done to its end, whatever happens to whoever waits for it."""

import asyncio

import pytest

from vlm_server.finishing import finished


async def test_what_the_work_returns_or_raises_is_the_callers() -> None:
    assert await finished(asyncio.sleep(0, "result")) == "result"
    with pytest.raises(TimeoutError):
        await finished(asyncio.wait_for(asyncio.Event().wait(), 0))


@pytest.mark.parametrize("fails", [False, True])
async def test_a_caller_that_is_cancelled_again_and_again_is_so_when_the_work_is_done(fails: bool) -> None:
    may_go, steps = asyncio.Event(), list[str]()

    async def work() -> None:
        await may_go.wait()
        steps.append("done")
        if fails:
            raise ValueError("told as the cause")

    caller = asyncio.create_task(finished(work()))
    for _ in range(3):
        await asyncio.sleep(0)
        caller.cancel()
    await asyncio.sleep(0)
    assert not caller.done()
    may_go.set()
    with pytest.raises(asyncio.CancelledError) as cancellation:
        await caller

    assert steps == ["done"]
    assert str(cancellation.value.__cause__) == ("told as the cause" if fails else "None")


async def test_work_that_is_cancelled_itself_cancels_its_caller() -> None:
    never = asyncio.get_running_loop().create_future()
    never.cancel()

    async def work() -> None:
        await never

    with pytest.raises(asyncio.CancelledError):
        await finished(work())
