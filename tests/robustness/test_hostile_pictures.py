"""A short flood of hostile pictures; the long one is `python -m tests.robustness.hostile_pictures`."""

import asyncio
import itertools

import pytest

from tests.robustness.hostile_pictures import flood
from tests.robustness.mutated_pictures import bombs, mutated, pictures
from tests.server_process import server_process
from vision.config import VisionConfig
from vision.decode_pool import DecodePool
from vision.image import MediaError


def test_the_same_seed_makes_the_same_files_and_another_one_others() -> None:
    first, again, other = (list(itertools.islice(mutated(seed), 50)) for seed in (1, 1, 2))

    assert first == again != other


# Bombs that hold a picture nonetheless: of an animation and of pages the first one is read, of too much data what its size asks for.
HARMLESS = {
    "gif of ten thousand frames",
    "png with a thousand chunks",
    "png unfolds beyond its size",
    "tiff whose pages turn in a circle",
}


async def test_every_good_picture_is_read_and_no_bomb_is() -> None:
    pool = DecodePool(VisionConfig())
    await pool.open()

    good = [await code_of(pool, data) for data in pictures().values()]
    codes = {name: await code_of(pool, data) for name, data in bombs().items()}

    await pool.close()
    assert set(good) == {"read"}
    assert {name for name, code in codes.items() if code == "read"} == HARMLESS
    assert set(codes.values()) == {"read", "image_decode_failed", "image_too_large"}


async def code_of(pool: DecodePool, data: bytes) -> str:
    try:
        (await pool.decode(data)).close()
    except MediaError as error:
        return error.code
    return "read"


@pytest.mark.full
def test_a_flood_of_hostile_pictures_disturbs_nobody() -> None:
    with server_process(None, "--log-level", "WARNING") as server:
        report = asyncio.run(flood(server, num_pictures=150, seed=1))

    assert report.not_answered == []
    assert report.num_other_stories == 0 < report.num_stories
    assert report.peak_bytes <= report.peak_limit_bytes
    assert report.num_sent == 150 + len(bombs())
