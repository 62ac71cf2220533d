import asyncio
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.vision.pictures import noise
from tests.vision.processes import freeze, is_gone, num_descriptors
from vision.budget import places_for
from vision.config import VisionConfig
from vision.image import ImageOptions, MediaError
from vision.preprocess import PreprocessResult, PreprocessSettings
from vision.preprocess_pool import PreprocessPool
from vision.shared_array import SharedArray
from vision.workers import WorkerError

FAKE = "tests.vision.fake_processor:FakeProcessor"


@pytest.fixture
async def pool() -> AsyncIterator[PreprocessPool]:
    pool = PreprocessPool(VisionConfig(), PreprocessSettings("model", True, FAKE))
    assert await pool.open() == "fake model True"
    yield pool
    await pool.close()


def picture(width: int = 8, height: int = 6) -> SharedArray:
    return SharedArray.copy_of(noise(width, height))


async def test_arrays_layout_and_number_of_tokens_come_back(pool: PreprocessPool) -> None:
    before = num_descriptors()

    result, arrays = await pool.process(picture(), ImageOptions())

    assert (result.num_tokens, result.layout) == (12, {"rows": 3})
    assert np.array_equal(arrays["pixel_values"].numpy(), noise(8, 6)[::2, ::2])
    assert arrays["sizes"].numpy().tolist() == [3, 4]
    for shared in arrays.values():
        shared.close()
    assert num_descriptors() == before


async def test_a_size_is_measured(pool: PreprocessPool) -> None:
    assert await pool.measure((6, 8), ImageOptions()) == PreprocessResult(12, {"rows": 3})


@pytest.mark.parametrize("options", [ImageOptions(), ImageOptions(min_pixels=1)], ids=str)
async def test_a_picture_of_more_tokens_than_are_allowed_is_refused(pool: PreprocessPool, options: ImageOptions) -> None:
    before = num_descriptors()

    with pytest.raises(MediaError) as refused:
        await pool.process(picture(), options, max_tokens=11)

    assert (refused.value.code, refused.value.status) == ("context_length_exceeded", 400)
    assert refused.value.message == "the picture has 12 tokens; at most 11 fit into a prompt (--session-len)"
    assert num_descriptors() == before
    result, arrays = await pool.process(picture(), options, max_tokens=12)
    assert result.num_tokens == 12
    for shared in arrays.values():
        shared.close()


@pytest.mark.parametrize("size", [{"min_pixels": 1}, {"max_pixels": 1}, {"settings": {"do_pan_and_scan": True}}], ids=str)
async def test_a_picture_whose_size_the_request_chose_is_refused_before_it_is_processed(pool: PreprocessPool, size: dict[str, Any]) -> None:
    fails_when_processed = ImageOptions(detail="high", **size)

    with pytest.raises(MediaError) as refused:
        await pool.process(picture(), fails_when_processed, max_tokens=11)

    assert refused.value.code == "context_length_exceeded"


async def test_errors_of_the_processor_reach_the_caller_without_their_text(pool: PreprocessPool) -> None:
    with pytest.raises(MediaError, match="too small for this model") as refused:
        await pool.process(picture(), ImageOptions(detail="low"))
    with pytest.raises(MediaError) as failed:
        await pool.process(picture(), ImageOptions(detail="high"))

    assert refused.value.code == "image_too_small"
    assert (failed.value.code, failed.value.status) == ("image_preprocess_failed", 400)
    assert failed.value.message == "the model does not take a picture of 8 × 6 pixels"


async def test_a_dead_worker_costs_its_own_picture_only(pool: PreprocessPool) -> None:
    (process_id,) = pool.process_ids

    dying, living = await asyncio.gather(
        pool.process(picture(13, 4), ImageOptions()), pool.process(picture(), ImageOptions()), return_exceptions=True
    )

    assert isinstance(dying, MediaError)
    assert dying.status == 503
    assert not isinstance(living, BaseException)
    assert living[0].num_tokens == 12
    assert is_gone(process_id)


async def test_a_picture_does_not_wait_behind_all_that_another_owner_sent_before_it(pool: PreprocessPool) -> None:
    """As a request has that counts the tokens of its pictures, which waits in no waiting room."""
    (process_id,) = pool.process_ids
    ended: list[str] = []

    async def work(job: Coroutine[Any, Any, object], owner: str) -> None:
        await job
        ended.append(owner)

    freeze(process_id)
    tasks = [asyncio.create_task(work(pool.measure((6, 8), ImageOptions(), owner="greedy"), "greedy")) for _ in range(16)]
    tasks += [asyncio.create_task(work(processed(pool, "modest"), "modest"))]
    await asyncio.sleep(0)
    os.kill(process_id, signal.SIGCONT)
    await asyncio.gather(*tasks)

    assert ended.index("modest") <= places_for(1)
    assert len(ended) == 17


async def test_a_picture_that_is_given_up_before_its_turn_gives_its_pixels_back(pool: PreprocessPool) -> None:
    (process_id,) = pool.process_ids
    before = num_descriptors()
    freeze(process_id)
    tasks = [asyncio.create_task(processed(pool, "owner")) for _ in range(5)]
    await asyncio.sleep(0)

    for task in tasks[2:]:
        task.cancel()
    await asyncio.gather(*tasks[2:], return_exceptions=True)
    os.kill(process_id, signal.SIGCONT)
    await asyncio.gather(*tasks[:2])

    assert num_descriptors() == before


async def processed(pool: PreprocessPool, owner: str) -> None:
    _, arrays = await pool.process(picture(), ImageOptions(), owner=owner)
    for shared in arrays.values():
        shared.close()


async def test_the_worker_has_one_thread_of_arithmetic_and_no_device(pool: PreprocessPool, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = (await asyncio.to_thread(Path(f"/proc/{pool.process_ids[0]}/environ").read_bytes)).split(b"\0")

    assert {b"OMP_NUM_THREADS=1", b"OMP_WAIT_POLICY=PASSIVE", b"CUDA_VISIBLE_DEVICES=", b"HF_HUB_OFFLINE=1"} <= set(environment)


async def test_a_processor_that_cannot_be_loaded_is_named() -> None:
    before = num_descriptors()
    pool = PreprocessPool(VisionConfig(), PreprocessSettings("missing", False, FAKE))

    with pytest.raises(WorkerError, match="FileNotFoundError: there is no such model"):
        await pool.open()

    assert (pool.process_ids, num_descriptors()) == ([], before)
