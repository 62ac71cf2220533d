"""The prompt tokens that wait in the engine: who counts until when, who waits, and who is refused."""

import asyncio
import http.client
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
import requests

from engine.request import EngineDeadError, ImageInput, Prompt, QueueFullError, SamplingParams, StepOutput
from tests.contract.running import RunningServer, fake_config, running_server
from vision.budget import Budget
from vision.config import VisionConfig
from vision.media_budgets import Holding, MediaBudgets, held_by
from vlm_server.backend import Engine
from vlm_server.queued_tokens import bounded_queue

PARAMS = SamplingParams()


class GatedEngine:
    """Gives two steps, the first once `first` is set, then raises `error`, where there is one."""

    def __init__(self, error: Exception | None = None) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        self.error = error
        self.asked: list[str] = []
        self.state = "ready"

    async def generate(self, prompt: Prompt, params: SamplingParams, *, request_id: str) -> AsyncGenerator[StepOutput, None]:
        self.asked.append(request_id)
        for may_begin in (self.first, self.second):
            await may_begin.wait()
            yield StepOutput(request_id=request_id, token_ids=[7])
        if self.error is not None:
            raise self.error


def budget(limit: int = 100, *, wait_s: float = 0.0) -> Budget:
    return Budget("queued_tokens", limit, wait_s=wait_s)


def room_of(engine: GatedEngine, budget: Budget) -> Engine:
    return bounded_queue(engine, budget)  # type: ignore[arg-type]


def prompt_of(num_tokens: int, *images: bytes) -> Prompt:
    ids = tuple(range(num_tokens))
    return Prompt(token_ids=ids, cache_keys=ids, images=tuple(ImageInput(image, 4, {}) for image in images))


async def run(room: Engine, num_tokens: int, name: str = "r") -> int:
    """The number of steps."""
    async with aclosing(room.generate(prompt_of(num_tokens), PARAMS, request_id=name)) as steps:
        return len([step async for step in steps])


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_prompt_counts_until_its_first_step() -> None:
    engine, queue = GatedEngine(), budget()
    room = room_of(engine, queue)

    running = asyncio.create_task(run(room, 60))
    await turns()
    assert queue.used == 60
    engine.first.set()
    await turns()
    assert queue.used == 0
    engine.second.set()

    assert await running == 2
    assert room.state == "ready", "all else is the engine's"


async def test_what_waits_too_long_is_refused_before_the_engine_hears_of_it() -> None:
    engine, queue = GatedEngine(), budget()
    room = room_of(engine, queue)
    running = asyncio.create_task(run(room, 60))
    await turns()

    with pytest.raises(QueueFullError, match="60 prompt tokens wait already, at most 100 may") as caught:
        await run(room, 50, "too much")
    assert caught.value.retry_after_s == 5, "nobody knows yet how fast they begin"
    assert (engine.asked, queue.num_refused) == (["r"], 1)

    engine.first.set()
    engine.second.set()
    assert await running == 2
    assert await run(room, 50) == 2


async def test_one_who_waits_is_let_in_by_anothers_first_step() -> None:
    engine, queue = GatedEngine(), budget(wait_s=10.0)
    room = room_of(engine, queue)
    running = [asyncio.create_task(run(room, 60, name)) for name in ("first", "second")]
    await turns()
    assert engine.asked == ["first"]

    engine.first.set()
    await turns()
    assert engine.asked == ["first", "second"]
    engine.second.set()
    await asyncio.gather(*running)

    assert queue.used == 0


@pytest.mark.parametrize("error", [EngineDeadError("the engine process ended"), QueueFullError("1024 requests wait"), KeyError("?")])
async def test_failures_give_the_tokens_back(error: Exception) -> None:
    engine, queue = GatedEngine(error), budget()
    engine.first.set()
    engine.second.set()

    with pytest.raises(type(error)):
        await run(room_of(engine, queue), 60)

    assert queue.used == 0


async def test_leaving_gives_the_tokens_back_in_the_engine_and_before_it() -> None:
    engine, queue = GatedEngine(), budget(wait_s=10.0)
    room = room_of(engine, queue)
    inside, outside = (asyncio.create_task(run(room, 60)) for _ in range(2))
    await turns()

    outside.cancel()
    await turns()
    assert (queue.used, queue.num_waiting) == (60, 0)
    inside.cancel()
    await asyncio.wait((inside, outside))

    assert queue.used == 0


async def test_a_request_that_was_let_in_is_not_refused_halfway() -> None:
    engine, queue = GatedEngine(), budget()
    room, holding = room_of(engine, queue), Holding(MediaBudgets(VisionConfig()), "a")
    with held_by(holding):
        running = [asyncio.create_task(run(room, 40, str(number))) for number in range(5)]
        await turns()
    assert engine.asked == ["0"], "two are more than one owner's share, 75"

    engine.first.set()
    engine.second.set()
    assert await asyncio.gather(*running) == [2] * 5
    assert queue.num_refused == 0


async def test_the_engine_has_a_prompts_pictures_with_its_first_step() -> None:
    media = MediaBudgets(VisionConfig())
    engine, holding = GatedEngine(), Holding(media, "a")
    with held_by(holding):
        for image in (b"mine", b"another prompt's"):
            holding.keep_arrays(image, (await media.pixels.reserve(10)).release)
        steps = room_of(engine, budget()).generate(prompt_of(5, b"mine"), PARAMS, request_id="r")
        engine.first.set()
        await anext(steps)

        assert media.pixels.used == 10
        await steps.aclose()
    assert media.pixels.used == 0


async def test_the_engines_own_refusal_says_when_as_many_tokens_will_have_begun() -> None:
    now_s = 0.0
    queue = Budget("queued_tokens", 1000, wait_s=0.0, clock=lambda: now_s)
    for _ in range(30):
        (await queue.reserve(10)).release()
        now_s += 1.0
    engine = GatedEngine(QueueFullError("1024 requests wait"))
    engine.first.set()
    engine.second.set()

    with pytest.raises(QueueFullError, match="1024 requests wait") as caught:
        await run(room_of(engine, queue), 200)

    assert 10 <= caught.value.retry_after_s <= 30, "200 at 10 a second, these 200 counted as begun"


CHAT = "/v1/chat/completions"
LONG = "x" * 150


def body_of(server: RunningServer, text: str = LONG) -> dict[str, object]:
    return {"model": server.model, "messages": [{"role": "user", "content": text}]}


def metric(server: RunningServer, name: str) -> float:
    lines = requests.get(server.url + "/metrics", timeout=10).text.splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{") and "queued_tokens" in line)


def test_over_the_limit_a_client_gets_429_and_after_another_left_its_answer() -> None:
    with running_server(fake_config(max_queued_tokens=300, vision=VisionConfig(budget_wait_s=0.0))) as server:
        server.backend.engine.hangs_after = 0
        waiting = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
        waiting.request("POST", CHAT, json.dumps(body_of(server)), {"content-type": "application/json"})
        assert server.backend.activity.has_begun_within(5)

        refused = requests.post(server.url + CHAT, json=body_of(server), timeout=10)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert refused.headers["retry-after"] == "5"
        assert "--max-queued-tokens" in refused.json()["error"]["message"]
        assert (metric(server, "vlm:budget_limit"), metric(server, "vlm:budget_refusals_total")) == (300, 1)
        assert 150 < metric(server, "vlm:budget_used") < 225

        waiting.close()
        assert server.backend.activity.was_left_within(5)
        server.backend.engine.hangs_after = None
        assert requests.post(server.url + CHAT, json=body_of(server), timeout=10).status_code == 200
        assert metric(server, "vlm:budget_used") == 0


def test_many_answers_to_one_request_are_not_refused_for_each_other() -> None:
    with running_server(fake_config(max_queued_tokens=300, vision=VisionConfig(budget_wait_s=0.0))) as server:
        answer = requests.post(server.url + CHAT, json=body_of(server) | {"n": 10}, timeout=10)

        assert answer.status_code == 200
        assert len(answer.json()["choices"]) == 10
        assert metric(server, "vlm:budget_used") == 0
