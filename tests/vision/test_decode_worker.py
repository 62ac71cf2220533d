import asyncio
import contextlib
import io
import os
import random
import signal
import socket
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.vision.pictures import encoded, noise, png
from tests.vision.processes import await_end, freeze, is_gone, memory_map, num_descriptors, python_prints, until
from vision import workers
from vision.config import VisionConfig
from vision.decode_pool import DecodePool
from vision.image import MediaError
from vision.shared_array import SharedArray

BROKEN = png()[:60]


@pytest.fixture
async def pool() -> AsyncIterator[DecodePool]:
    pool = DecodePool(VisionConfig(num_decode_workers=1))
    await pool.open()
    yield pool
    await pool.close()


@pytest.fixture
async def hasty_pool() -> AsyncIterator[DecodePool]:
    pool = DecodePool(VisionConfig(num_decode_workers=1, decode_timeout_s=0.3))
    await pool.open()
    yield pool
    await pool.close()


async def decoded(pool: DecodePool, data: bytes) -> np.ndarray:
    shared = await pool.decode(data)
    pixels = shared.numpy().copy()
    shared.close()
    return pixels


async def code_of(pool: DecodePool, data: bytes) -> str:
    with pytest.raises(MediaError) as caught:
        await pool.decode(data)
    return caught.value.code


async def test_a_picture_comes_back_as_pixels(pool: DecodePool) -> None:
    assert np.array_equal(await decoded(pool, png(31, 17)), noise(31, 17))


async def test_a_picture_is_measured_by_its_header_even_where_its_pixels_are_missing(pool: DecodePool) -> None:
    assert await pool.measure(png(31, 17)[:60]) == (17, 31)

    with pytest.raises(MediaError, match="not a JPEG, PNG"):
        await pool.measure(b"GIF")


async def test_many_pictures_at_once_each_get_their_own_pixels() -> None:
    pool = DecodePool(VisionConfig(num_decode_workers=2))
    await pool.open()

    pictures = await asyncio.gather(*(decoded(pool, png(9, 5, seed=seed)) for seed in range(20)))

    assert all(np.array_equal(pixels, noise(9, 5, seed=seed)) for seed, pixels in enumerate(pictures))
    await pool.close()


async def test_a_bad_picture_leaves_its_worker_alive(pool: DecodePool) -> None:
    before = pool.process_ids

    assert await code_of(pool, BROKEN) == "image_decode_failed"
    assert np.array_equal(await decoded(pool, png()), noise(8, 6))
    assert pool.process_ids == before


async def test_pictures_over_the_pixel_limit_are_refused_with_both_numbers() -> None:
    pool = DecodePool(VisionConfig(num_decode_workers=1, max_picture_pixels=47))
    await pool.open()

    with pytest.raises(MediaError, match="8 × 6 pixels; at most 47") as caught:
        await pool.decode(png(8, 6))

    assert caught.value.code == "image_too_large"
    await pool.close()


async def test_pixels_travel_however_many_descriptors_are_on_their_way(pool: DecodePool) -> None:
    """The kernel counts those of all of a user's processes, the pictures that wait for a busy engine among them."""
    busy, waiting = socket.socketpair()
    with busy, waiting, contextlib.closing(SharedArray.create((1,), "uint8")) as shared:
        for _ in range(100):
            socket.send_fds(busy, [b"x"], [shared.fd])

        assert np.array_equal(await decoded(pool, png()), noise(8, 6))


@pytest.mark.parametrize("size", [(8, 6), (6, 8), (48, 1)])
async def test_the_largest_picture_has_room_for_its_pixels(size: tuple[int, int]) -> None:
    pool = DecodePool(VisionConfig(num_decode_workers=1, max_picture_pixels=48))
    await pool.open()

    assert np.array_equal(await decoded(pool, png(*size)), noise(*size))
    assert await code_of(pool, png(7, 7)) == "image_too_large"
    await pool.close()


async def test_a_picture_that_needs_too_much_memory_fails_alone() -> None:
    pool = DecodePool(VisionConfig(num_decode_workers=1, decode_memory_bytes=64 << 20, max_picture_pixels=1 << 40))
    await pool.open()
    rows = struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + rows
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png()[33:]

    assert await code_of(pool, bomb) == "image_too_large"
    assert np.array_equal(await decoded(pool, png()), noise(8, 6))
    await pool.close()


async def test_a_worker_that_its_picture_ends_costs_that_picture_only(pool: DecodePool) -> None:
    (process_id,) = pool.process_ids
    freeze(process_id)
    first = asyncio.create_task(pool.decode(png()))
    second = asyncio.create_task(decoded(pool, png(seed=1)))
    await until(lambda: pool.num_idle == 0)

    os.kill(process_id, signal.SIGSEGV)
    os.kill(process_id, signal.SIGCONT)

    with pytest.raises(MediaError) as caught:
        await first
    assert (caught.value.code, caught.value.status) == ("image_decode_failed", 400)
    assert np.array_equal(await second, noise(8, 6, seed=1))
    assert pool.process_ids != [process_id]
    assert is_gone(process_id)


async def test_a_picture_whose_worker_somebody_kills_is_decoded_by_another_one(pool: DecodePool) -> None:
    (process_id,) = pool.process_ids
    freeze(process_id)
    decoding = asyncio.create_task(decoded(pool, png()))
    await until(lambda: pool.num_idle == 0)

    os.kill(process_id, signal.SIGKILL)

    assert np.array_equal(await decoding, noise(8, 6))
    assert pool.num_idle == 1


async def test_a_picture_whose_workers_are_killed_over_and_over_may_be_sent_again(
    pool: DecodePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one too, as soon as it is started."""
    start = pool._pool._start

    async def start_and_kill() -> Any:
        worker, ready = await start()
        worker.process.kill()
        return worker, ready

    (process_id,) = pool.process_ids
    freeze(process_id)
    decoding = asyncio.create_task(pool.decode(png()))
    await until(lambda: pool.num_idle == 0)
    with monkeypatch.context() as patched:
        patched.setattr(pool._pool, "_start", start_and_kill)
        os.kill(process_id, signal.SIGKILL)

        with pytest.raises(MediaError) as caught:
            await decoding

    assert (caught.value.code, caught.value.status) == ("image_decode_failed", 503)
    assert np.array_equal(await decoded(pool, png()), noise(8, 6))


async def test_a_worker_leaves_the_end_to_its_server(pool: DecodePool) -> None:
    """A service manager that stops all processes at once: running requests may finish."""
    (process_id,) = pool.process_ids

    os.kill(process_id, signal.SIGTERM)

    assert np.array_equal(await decoded(pool, png()), noise(8, 6))
    assert pool.process_ids == [process_id]


async def test_a_worker_that_cannot_be_started_fails_the_picture_and_the_next_one_tries_again(
    pool: DecodePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (process_id,) = pool.process_ids
    os.kill(process_id, signal.SIGKILL)
    await_end(process_id)
    before = num_descriptors()

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("no more processes")

    with monkeypatch.context() as patched:
        patched.setattr("vision.workers.subprocess.Popen", fail)
        assert await code_of(pool, png()) == "image_decode_failed"
        await until(lambda: pool.num_idle == 1)

    assert np.array_equal(await decoded(pool, png()), noise(8, 6))
    assert num_descriptors() <= before


async def test_a_worker_that_died_idle_is_replaced_before_the_next_picture(pool: DecodePool) -> None:
    (process_id,) = pool.process_ids
    os.kill(process_id, signal.SIGKILL)
    await_end(process_id)

    assert np.array_equal(await decoded(pool, png()), noise(8, 6))


async def test_a_wake_up_for_nothing_costs_no_worker(pool: DecodePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event loop may say that there is something to read where there is not yet."""
    (process_id,) = pool.process_ids
    freeze(process_id)
    readable, num_woken = workers._readable, 0

    async def woken_early(connection: socket.socket) -> None:
        nonlocal num_woken
        num_woken += 1
        if num_woken > 3:
            os.kill(process_id, signal.SIGCONT)
            await readable(connection)

    monkeypatch.setattr(workers, "_readable", woken_early)

    assert np.array_equal(await decoded(pool, png()), noise(8, 6))
    assert num_woken > 3
    assert pool.process_ids == [process_id]


async def test_a_hung_worker_is_killed_and_replaced(hasty_pool: DecodePool) -> None:
    (process_id,) = hasty_pool.process_ids
    freeze(process_id)

    with pytest.raises(MediaError, match=r"longer than the allowed 0\.3 s") as caught:
        await hasty_pool.decode(png())

    assert caught.value.code == "image_decode_failed"
    assert np.array_equal(await decoded(hasty_pool, png()), noise(8, 6))
    assert is_gone(process_id)


async def test_a_cancelled_picture_gives_everything_back(pool: DecodePool) -> None:
    await decoded(pool, png())
    before = num_descriptors()
    freeze(pool.process_ids[0])
    with_worker = asyncio.create_task(pool.decode(png()))
    waiting = asyncio.create_task(pool.decode(png()))
    await until(lambda: pool.num_idle == 0)

    with_worker.cancel()
    waiting.cancel()

    await asyncio.gather(with_worker, waiting, return_exceptions=True)
    assert np.array_equal(await decoded(pool, png()), noise(8, 6)), "the frozen worker is killed when its picture is abandoned"
    assert num_descriptors() == before


async def test_nothing_is_left_open_after_good_bad_and_hanging_pictures() -> None:
    before = num_descriptors()
    pool = DecodePool(VisionConfig(num_decode_workers=2, decode_timeout_s=0.3))
    await pool.open()
    process_ids = pool.process_ids
    await asyncio.gather(*(pool.decode(data) for data in [png(), BROKEN, png(), b"x"] * 5), return_exceptions=True)
    freeze(process_ids[0])
    await asyncio.gather(*(pool.decode(png()) for _ in range(4)), return_exceptions=True)
    process_ids += pool.process_ids

    await pool.close()

    assert num_descriptors() == before
    assert all(is_gone(process_id) for process_id in process_ids)


async def test_closing_the_pool_ends_pictures_under_way_and_waiting(pool: DecodePool) -> None:
    freeze(pool.process_ids[0])
    jobs = [asyncio.create_task(pool.decode(png())) for _ in range(3)]
    await until(lambda: pool.num_idle == 0)

    await pool.close()

    for result in await asyncio.gather(*jobs, return_exceptions=True):
        assert isinstance(result, MediaError)


async def test_the_worker_ends_when_the_server_is_gone(pool: DecodePool) -> None:
    program = (
        "import asyncio, os; from vision.config import VisionConfig; from vision.decode_pool import DecodePool\n"
        "async def main():\n"
        "    pool = DecodePool(VisionConfig(num_decode_workers=1)); await pool.open()\n"
        "    print(pool.process_ids[0], flush=True); os._exit(0)\n"
        "asyncio.run(main())"
    )
    process_id = int(await asyncio.to_thread(python_prints, program))

    await until(lambda: is_gone(process_id))


async def test_the_worker_has_limits_few_descriptors_and_no_secrets(pool: DecodePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    guarded = DecodePool(VisionConfig(num_decode_workers=1))
    await guarded.open()
    process = Path(f"/proc/{guarded.process_ids[0]}")

    limits = {line[:25].strip(): line[25:].split() for line in (process / "limits").read_text().splitlines()}

    assert b"hunter2" not in (process / "environ").read_bytes()
    assert limits["Max core file size"][:2] == ["0", "0"]
    assert limits["Max open files"][:2] == ["64", "64"]
    assert limits["Max file size"][:2] == [str(3 * VisionConfig().max_picture_pixels)] * 2
    assert int(limits["Max address space"][1]) < 3 << 30
    assert "NoNewPrivs:\t1" in (process / "status").read_text(), "it is confined, see test_confinement"
    assert len(list((process / "fd").iterdir())) <= 4, "input, output, errors and its socket"
    assert (process / "fd" / "2").readlink() == Path(os.devnull), "what it prints about pictures is not for the log"
    await decoded(guarded, png())
    assert os.getpriority(os.PRIO_PROCESS, guarded.process_ids[0]) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
    limits = {line[:25].strip(): line[25:].split() for line in (process / "limits").read_text().splitlines()}
    assert int(limits["Max cpu time"][0]) <= 13
    await guarded.close()


async def test_the_running_worker_has_no_torch(pool: DecodePool) -> None:
    await decoded(pool, png())

    assert "torch" not in memory_map(pool.process_ids[0])


def test_the_decode_worker_imports_no_torch_and_only_seven_formats(tmp_path: Path) -> None:
    image = Image.fromarray(noise(16, 16))
    for form in ("EPS", "ICO", "PPM", "TGA", "PCX", "JPEG2000", "SGI", "ICNS", "MPO"):
        (tmp_path / form).write_bytes(encoded(image, form, **({"save_all": True, "append_images": [image]} if form == "MPO" else {})))
    program = f"""
import pathlib, sys
import vision.decode, vision.pixels
from vision.shared_array import SharedArray
for file in pathlib.Path({str(tmp_path)!r}).iterdir():
    try:
        vision.pixels.decode_picture(file.read_bytes(), SharedArray.create((0,), "uint8"), max_pixels=1 << 20)
        print(file.name)
    except vision.pixels.MediaError as error:
        assert error.code == "image_decode_failed"
print(*sorted(name for name in sys.modules if name.endswith("ImagePlugin")))
print("torch" in sys.modules, "aiohttp" in sys.modules, "asyncio" in sys.modules)
"""

    first, plugins, others_loaded = python_prints(program).splitlines()

    assert first == "MPO", "which is a JPEG with another picture behind it"
    assert plugins.split() == [f"PIL.{form}ImagePlugin" for form in ("Avif", "Bmp", "Gif", "Jpeg", "Png", "Tiff", "WebP")]
    assert others_loaded == "False False False"


async def test_mutated_pictures_give_pixels_or_an_error_and_leave_the_worker_alive(pool: DecodePool) -> None:
    chance = random.Random(7)
    image = Image.fromarray(noise(12, 9))
    originals = [encoded(image, form) for form in ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF")]
    before = pool.process_ids
    num_decoded = 0

    for original in originals * 30:
        mutated = bytearray(original)
        for _ in range(chance.randint(1, 8)):
            mutated[chance.randrange(len(mutated))] = chance.randrange(256)
        try:
            pixels = await decoded(pool, bytes(mutated))
            assert await pool.measure(bytes(mutated)) == pixels.shape[:2]
            num_decoded += 1
        except MediaError as error:
            assert error.code in ("image_decode_failed", "image_too_large")  # noqa: PT017

    assert 20 < num_decoded < 190, "some survive, some do not"
    assert pool.process_ids == before


async def test_a_jpeg_named_otherwise_is_still_a_jpeg(pool: DecodePool) -> None:
    data = encoded(Image.fromarray(noise(16, 16)), "JPEG")

    assert np.array_equal(await decoded(pool, data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
