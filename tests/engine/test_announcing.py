"""What the server sends of announced pictures: bounds, order, and descriptors that are given back."""

import asyncio
import os
from dataclasses import dataclass, field

import pytest

from engine.announcing import MAX_PICTURES, MAX_PICTURES_PER_PROMPT, Announcements
from engine.messages import Announce, Withdraw
from engine.request import EngineDeadError
from tests.engine.fake_encoder import fake_image


@dataclass
class FakeEngine:
    """Notes what it is sent, without the arrays, which it lets go."""

    is_dead: bool = False
    received: list[tuple[str, object]] = field(default_factory=list)

    async def send(self, message: Announce | Withdraw) -> None:
        if self.is_dead:
            raise EngineDeadError("the engine process ended")
        if isinstance(message, Announce):
            self.received.append((message.owner, int(message.image.arrays["pixel_values"].numpy()[0, 0, 0, 0])))
        else:
            self.received.append((message.owner, message.request_follows))


async def all_sent() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others)


async def test_pictures_go_out_in_order_though_the_caller_closes_them_at_once() -> None:
    engine = FakeEngine()
    announcement = Announcements(engine.send).open()

    for value in (1, 2):
        image = fake_image(value)
        announcement.add(image)
        image.arrays["pixel_values"].close()
    announcement.end(request_follows=True)
    await all_sent()

    owner = engine.received[0][0]
    assert engine.received == [(owner, 1), (owner, 2), (owner, True)]


@pytest.mark.parametrize("is_dead", [False, True])
async def test_nothing_is_left_once_all_is_sent_or_the_engine_is_dead(is_dead: bool) -> None:
    announcements = Announcements(FakeEngine(is_dead=is_dead).send)
    image = fake_image(1)
    before = len(os.listdir("/proc/self/fd"))

    announcement = announcements.open()
    announcement.add(image)
    announcement.end(request_follows=False)
    await all_sent()

    assert len(os.listdir("/proc/self/fd")) == before
    assert (announcements.num_pictures, announcements.num_bytes) == (0, 0)


async def test_a_prompt_and_all_prompts_announce_only_so_many_pictures() -> None:
    engine = FakeEngine()
    announcements = Announcements(engine.send)
    prompts = [announcements.open() for _ in range(MAX_PICTURES // MAX_PICTURES_PER_PROMPT + 1)]

    for prompt in prompts:
        for _ in range(MAX_PICTURES_PER_PROMPT + 1):
            prompt.add(fake_image(1))
    await all_sent()

    assert len(engine.received) == MAX_PICTURES
    prompts[0].end(request_follows=True)
    prompts[-1].add(fake_image(1))
    await all_sent()
    assert announcements.num_pictures == MAX_PICTURES - MAX_PICTURES_PER_PROMPT + 1


async def test_pictures_that_are_too_large_together_are_not_announced(monkeypatch) -> None:
    monkeypatch.setattr("engine.announcing.MAX_BYTES", 2 * 12)
    engine = FakeEngine()
    announcement = Announcements(engine.send).open()

    for value in (1, 2, 3):
        announcement.add(fake_image(value))
    await all_sent()

    assert [value for _, value in engine.received] == [1, 2]


async def test_nothing_is_withdrawn_that_was_never_announced() -> None:
    engine = FakeEngine()

    Announcements(engine.send).open().end(request_follows=True)
    await all_sent()

    assert engine.received == []
