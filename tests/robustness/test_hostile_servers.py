"""Picture servers that keep to nothing, each alone; 200 of them beside a chat is `python -m tests.robustness.hostile_servers`."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from tests.robustness.hostile_origins import ORIGINS, PICTURE, hostile_origins
from vision.body import CappedBody
from vision.config import VisionConfig
from vision.decode_pool import DecodePool
from vision.fetcher import Fetcher
from vision.image import MediaError

LIMIT_S = 10.0
SOON = VisionConfig(allow_private_media=("127.0.0.0/8",), fetch_timeout_s=1.0, max_picture_bytes=1 << 20, retry_pause_s=0.001)


@pytest.fixture
async def fetcher() -> AsyncIterator[Fetcher]:
    fetcher = Fetcher(SOON)
    await fetcher.open()
    yield fetcher
    await fetcher.close()


async def code_of(fetcher: Fetcher, pool: DecodePool, url: str) -> str:
    try:
        (await pool.decode(await fetcher.fetch(url))).close()
    except MediaError as error:
        return error.code
    return ""


async def test_every_hostile_server_ends_with_its_code_within_the_limit(fetcher: Fetcher) -> None:
    """All at once, beside one that is good."""
    pool = DecodePool(SOON)
    await pool.open()
    async with hostile_origins() as (url,), asyncio.timeout(LIMIT_S):
        codes = await asyncio.gather(*(code_of(fetcher, pool, f"{url}/{name}") for name in ORIGINS))
    await pool.close()

    wrong = {name: code for name, code in zip(ORIGINS, codes, strict=True) if code not in ORIGINS[name].codes}
    assert wrong == {}


async def test_what_a_server_compressed_is_unfolded_beside_the_event_loop(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[bool] = []
    append = CappedBody.append

    def noting(body: CappedBody, chunk: bytes) -> None:
        threads.append(threading.current_thread() is threading.main_thread())
        append(body, chunk)

    monkeypatch.setattr(CappedBody, "append", noting)
    async with hostile_origins() as (url,):
        with pytest.raises(MediaError, match="more than the allowed"):
            await fetcher.fetch(f"{url}/bomb")
        on_the_loop_when_compressed = set(threads)
        threads.clear()
        data = await fetcher.fetch(f"{url}/claims_nothing")

    assert data == PICTURE
    assert on_the_loop_when_compressed == {False}
    assert set(threads) == {True}
