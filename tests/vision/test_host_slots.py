import asyncio

import pytest

from vision.host_slots import HostSlots


async def test_a_host_that_nobody_uses_takes_no_memory() -> None:
    slots = HostSlots(1)

    async with slots.hold("a"), slots.hold("b"):
        assert len(slots) == 2

    assert len(slots) == 0


async def test_one_who_leaves_the_queue_gives_its_place_to_the_next() -> None:
    slots, order = HostSlots(1), []

    async def user(name: str) -> None:
        async with slots.hold("a"):
            order.append(name)

    async with slots.hold("a"):
        leaving, staying = asyncio.create_task(user("leaving")), asyncio.create_task(user("staying"))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait((leaving,))

    await staying
    assert order == ["staying"]
    assert len(slots) == 0


async def test_an_error_gives_the_slot_back() -> None:
    slots = HostSlots(1)

    with pytest.raises(KeyError):
        async with slots.hold("a"):
            raise KeyError

    assert len(slots) == 0
