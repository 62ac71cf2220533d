"""The meter of one request: what is charged, when it is refused, and that pictures count by their size."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from engine.request import EngineDeadError, Prompt, SamplingParams, StepOutput
from tests.image_fixtures import FakeImages, picture, tiny_folder
from tests.vlm_server.fake_clock import FakeClock
from tests.vlm_server.test_pipeline import JINJA
from vision.image import ImageRef, MediaError, ProcessedImage
from vlm_server.backend import Engine
from vlm_server.metered_engine import metered_engine
from vlm_server.metering import current_meter, metered
from vlm_server.picture_loading import PictureLoading
from vlm_server.picture_report import PictureReport
from vlm_server.pipeline import Pipeline
from vlm_server.quotas import PIXELS, TOKENS, Limits, Quota, QuotaExceededError
from vlm_server.stage_timings import StageTimings

PROMPT = Prompt(token_ids=(1, 2, 3, 4), cache_keys=(1, 2, 3, 4))
PARAMS = SamplingParams()


class ScriptedEngine:
    """Gives `steps`; then raises `error`, where there is one."""

    def __init__(self, steps: Sequence[Sequence[int]] = (), error: Exception | None = None) -> None:
        self.steps, self.error = steps, error
        self.state = "ready"
        self.num_asked = 0

    async def generate(self, prompt: Prompt, params: SamplingParams, *, request_id: str) -> AsyncGenerator[StepOutput, None]:
        self.num_asked += 1
        for step in self.steps:
            await asyncio.sleep(0)
            yield StepOutput(request_id=request_id, token_ids=list(step))
        if self.error is not None:
            raise self.error


def quota(**limits: int) -> Quota:
    return Quota(Limits(**limits), owner="alice", clock_ns=FakeClock())


def used(quota: Quota, kind: str = TOKENS) -> int:
    standing = quota.standings()[kind]
    return standing.limit - standing.remaining


async def run(engine: Engine, prompt: Prompt = PROMPT) -> int:
    """The number of steps."""
    async with aclosing(engine.generate(prompt, PARAMS, request_id="r")) as steps:
        return len([step async for step in steps])


async def test_prompt_and_steps_are_charged() -> None:
    limited, engine = quota(tokens=100), metered_engine(ScriptedEngine([[7], [8, 9]]))  # type: ignore[arg-type]

    with metered(limited):
        assert await run(engine) == 2

    assert used(limited) == 4 + 3


async def test_without_a_meter_nothing_is_between_caller_and_engine() -> None:
    inner = ScriptedEngine([[7]])
    engine = metered_engine(inner)  # type: ignore[arg-type]

    assert current_meter() is None
    assert await run(engine) == 1
    assert engine.state == "ready"


async def test_answers_to_one_prompt_share_its_charge_and_other_prompts_have_their_own() -> None:
    limited, engine = quota(tokens=100), metered_engine(ScriptedEngine([[7]]))  # type: ignore[arg-type]
    other = Prompt(token_ids=(5, 6), cache_keys=(5, 6))

    with metered(limited):
        await asyncio.gather(run(engine), run(engine), run(engine, other))

    assert used(limited) == 4 + 2 + 3


async def test_answers_that_the_engine_refuses_together_give_the_prompt_back_once() -> None:
    limited, engine = quota(tokens=100), metered_engine(ScriptedEngine(error=EngineDeadError("gone")))  # type: ignore[arg-type]
    limited.take(TOKENS, 50)

    with metered(limited):
        results = await asyncio.gather(run(engine), run(engine), return_exceptions=True)

    assert all(isinstance(result, EngineDeadError) for result in results)
    assert used(limited) == 50


async def test_requests_at_the_same_time_have_meters_of_their_own() -> None:
    quotas = [quota(tokens=100) for _ in range(3)]
    engine = metered_engine(ScriptedEngine([[7]] * 5))  # type: ignore[arg-type]

    async def serve(limited: Quota) -> None:
        with metered(limited):
            await asyncio.create_task(run(engine))

    await asyncio.gather(*map(serve, (*quotas, quotas[0])))

    assert [used(limited) for limited in quotas] == [2 * 9, 9, 9]
    assert current_meter() is None


async def test_once_admitted_a_request_goes_on_and_the_next_is_refused_before_the_engine_hears_of_it() -> None:
    limited, inner = quota(tokens=5), ScriptedEngine([[7]] * 3)
    engine = metered_engine(inner)  # type: ignore[arg-type]

    with metered(limited):
        await run(engine)
        await run(engine)
    with metered(limited), pytest.raises(QuotaExceededError):
        await run(engine)

    assert inner.num_asked == 2


class CountingImages(FakeImages):
    """Counts what it is asked for."""

    num_loaded = num_fetched = 0

    async def load(self, refs: Sequence[ImageRef], **options: Any) -> list[ProcessedImage]:
        self.num_loaded += len(refs)
        return await super().load(refs, **options)

    async def fetch(
        self, refs: Sequence[ImageRef], *, limit_bytes: int, tenant: str = "", kept: Mapping[str, bytes] | None = None
    ) -> list[bytes]:
        self.num_fetched += len(refs)
        return [b""] * len(refs)


def question(*names: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": name}} for name in names]}]


async def test_pictures_that_were_loaded_are_charged_though_another_fails() -> None:
    class HalfBroken:
        async def load(self, refs: Sequence[ImageRef], *, on_loaded: Callable[[ProcessedImage], None], **_: object) -> list[ProcessedImage]:
            on_loaded(ProcessedImage(b"a", 1, {}, {}, 40, 30, {}))
            raise MediaError("image_decode_failed", "broken")

    limited = quota(pixels=5000)
    refs = [ImageRef(url, param="messages") for url in ("a", "b")]
    with metered(limited), pytest.raises(MediaError):
        await PictureLoading(HalfBroken()).load(  # type: ignore[arg-type]
            refs, salt="", as_input=lambda image: pytest.fail("nothing is announced"), timings=StageTimings(), report=PictureReport()
        )

    assert used(limited, PIXELS) == 1200


async def test_pictures_are_charged_their_pixels_in_every_request_and_refused_before_they_are_loaded() -> None:
    name = "llava"
    images = CountingImages(name, {"wide": picture((60, 40), 1), "small": picture((20, 10), 2)})
    pipeline = Pipeline.load(tiny_folder(name), images=images, jinja=JINJA)
    limited = quota(pixels=5000, tokens=1000)
    try:
        for _ in range(2):
            with metered(limited):
                await pipeline.chat_prompt(question("wide", "small"))
        assert used(limited, PIXELS) == 5000
        with metered(limited), pytest.raises(QuotaExceededError) as caught:
            await pipeline.chat_prompt(question("small"))
        with metered(limited), pytest.raises(QuotaExceededError):
            await pipeline.fetch_pictures([ImageRef("small", "image_url")], limit_bytes=9)
        with metered(limited):
            await pipeline.chat_prompt([{"role": "user", "content": "no picture"}])
    finally:
        pipeline.close()
        for array in (array for image in images.given for array in image.arrays.values()):
            array.close()

    assert caught.value.kind == PIXELS
    assert (images.num_loaded, images.num_fetched) == (4, 0)


async def test_without_tokens_left_no_picture_is_loaded() -> None:
    images = CountingImages("llava", {"small": picture((20, 10), 2)})
    pipeline = Pipeline.load(tiny_folder("llava"), images=images, jinja=JINJA)
    limited = quota(pixels=5000, tokens=10)
    limited.take(TOKENS, 10)
    try:
        with metered(limited), pytest.raises(QuotaExceededError, match="tokens per minute"):
            await pipeline.chat_prompt(question("small"))
    finally:
        pipeline.close()

    assert images.num_loaded == 0
