import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.vision.picture_server import Gate, PictureServer, body
from tests.vision.pictures import data_url, noise, png
from tests.vision.processes import freeze, is_gone, num_descriptors, until
from vision.config import VisionConfig
from vision.image import ImageOptions, ImageRef, MeasuredImage, MediaError, ProcessedImage
from vision.service import VisionService
from vision.workers import WorkerError

FAKE = "tests.vision.fake_processor:FakeProcessor"


def unopened(*, model_folder: str = "model", **limits: Any) -> VisionService:
    config = VisionConfig(**({"allow_private_media": ("127.0.0.0/8",), "num_decode_workers": 1} | limits))
    return VisionService(config, model_folder=model_folder, processor=FAKE)


@pytest.fixture
async def service() -> AsyncIterator[VisionService]:
    service = unopened()
    await service.open()
    yield service
    await service.close()


@pytest.fixture
async def server() -> AsyncIterator[PictureServer]:
    server = PictureServer()
    await server.open()
    yield server
    await server.close()


def refs(*urls: str, **options: Any) -> list[ImageRef]:
    return [ImageRef(url, f"messages[0].content[{at}].image_url", ImageOptions(**options)) for at, url in enumerate(urls)]


def close(images: list[ProcessedImage]) -> None:
    for image in images:
        for shared in image.arrays.values():
            shared.close()


async def test_pictures_come_back_in_order_with_everything_the_model_needs(service: VisionService, server: PictureServer) -> None:
    web, inline = await service.load(refs(server.url(), data_url(png(20, 10, seed=1))))

    assert (web.width, web.height, web.num_tokens, web.layout) == (8, 6, 12, {"rows": 3})
    assert (inline.width, inline.height, inline.num_tokens, inline.layout) == (20, 10, 50, {"rows": 5})
    assert np.array_equal(web.arrays["pixel_values"].numpy(), noise(8, 6)[::2, ::2])
    assert set(web.timings_s) == {"fetch", "decode", "preprocess"}
    assert all(seconds >= 0 for seconds in web.timings_s.values())
    stats = service.stats()
    assert {stage: sum(counts) for stage, counts in stats.durations.items()} == stats.num_done
    assert (stats.num_http_misses, stats.num_http_fresh, stats.oldest_in_flight_s) == (1, 0, 0)
    close([web, inline])


async def test_trying_out_goes_through_the_workers_and_leaves_no_trace(service: VisionService) -> None:
    await service.ready()
    before, stages = service.stats(), list[str]()

    images = [await service.try_out(png(20, 10, seed=1), ImageOptions(), on_stage=stages.append) for _ in range(2)]

    assert stages == ["decode", "preprocess"] * 2
    assert np.array_equal(images[0].arrays["pixel_values"].numpy(), noise(20, 10, seed=1)[::2, ::2])
    assert set(images[0].timings_s) == {"decode", "preprocess"}
    assert images[0].content_hash != images[1].content_hash
    close(images)
    with pytest.raises(MediaError) as caught:
        await service.try_out(b"no picture", ImageOptions(), on_stage=stages.append)
    assert caught.value.code == "image_decode_failed"
    assert stages[-1] == "decode"
    assert service.stats() == before


async def test_one_service_through_hits_misses_tenants_options_and_errors(service: VisionService, server: PictureServer) -> None:
    """One walk in one service, because each start of a preprocessing worker takes seconds."""
    await service.ready()
    before = num_descriptors()

    # Equal pictures in one call are processed once, however they came.
    first, second, third = await service.load(refs(server.url(), data_url(png()), server.url()))
    assert first.content_hash == second.content_hash == third.content_hash
    assert service.stats().num_done["preprocess"] == 1

    # Each caller owns what it got: closing one result leaves the others and the cache alone.
    close([first])
    assert np.array_equal(second.arrays["pixel_values"].numpy(), noise(8, 6)[::2, ::2])
    close([second, third])

    # A picture that is known skips decoding and preprocessing.
    num_hits = service.stats().num_cache_hits
    (again,) = await service.load(refs(data_url(png())))
    assert np.array_equal(again.arrays["pixel_values"].numpy(), noise(8, 6)[::2, ::2])
    assert set(again.timings_s) == {"fetch"}
    assert (service.stats().num_done["decode"], service.stats().num_cache_hits) == (1, num_hits + 1)
    close([again])

    # Measuring says the same and neither decodes nor preprocesses; only the header has to be there.
    measured = await service.measure(refs(server.url(), data_url(png()[:50])))
    assert measured == [MeasuredImage(again.num_tokens, again.layout)] * 2
    assert (service.stats().num_done["decode"], service.stats().num_done["preprocess"]) == (1, 1)

    # Options and tenants are part of what is known; other pictures have other hashes.
    (sized,) = await service.load(refs(data_url(png()), max_pixels=100))
    (whole,) = await service.load(refs(data_url(png()), settings={"do_image_splitting": False}))
    (tiled,) = await service.load(refs(data_url(png()), settings={"do_image_splitting": True}))
    (other,) = await service.load(refs(data_url(png(seed=2))))
    (theirs,) = await service.load(refs(data_url(png())), tenant="other")
    assert len({image.content_hash for image in (first, sized, whole, tiled, other)}) == 5
    assert theirs.content_hash == first.content_hash
    assert service.stats().num_done["preprocess"] == 6
    close([sized, whole, tiled, other, theirs])

    # Each picture is told of when it is there, not when all are.
    gate, told = Gate(png()), asyncio.Queue[ProcessedImage]()
    server.pages["/slow"] = gate
    loading = asyncio.create_task(service.load(refs(server.url("/slow"), data_url(png(seed=2))), on_loaded=told.put_nowait))
    early = await told.get()
    assert not loading.done()
    gate.is_open.set()
    slow, quick = await loading
    assert early is quick
    assert (await told.get()) is slow
    close([slow, quick])

    # The first error cancels the rest and names its part of the request.
    gate = server.pages["/gate"] = Gate(png())
    server.pages["/broken"] = body(png()[:50])
    for bad_url, code in [
        (server.url("/broken"), "image_decode_failed"),
        ("http://10.0.0.1/", "url_blocked"),
        (server.url("/missing"), "image_fetch_failed"),
        ("nonsense", "url_invalid"),
    ]:
        with pytest.raises(MediaError) as caught:
            await service.load(refs(data_url(png()), server.url("/gate"), bad_url))
        assert (caught.value.code, caught.value.param) == (code, "messages[0].content[2].image_url")
        assert service.stats().num_failed[code] == 1
    await until(lambda: gate.num_left == len([request for request in server.requests if request.path == "/gate"]))

    # Two parts that share a download and its failure each name their own.
    results = await asyncio.gather(
        service.load([ImageRef(server.url("/broken"), "a")]), service.load([ImageRef(server.url("/broken"), "b")]), return_exceptions=True
    )
    assert [result.param for result in results if isinstance(result, MediaError)] == ["a", "b"]

    # Nothing is in flight any more, and only the six cached pictures' descriptors are open.
    stats = service.stats()
    assert stats.num_in_flight == {"fetch": 0, "decode": 0, "preprocess": 0}
    assert stats.cache_bytes == 6 * (3 * 4 * 3 + 2 * 8)
    await service.close()
    await until(lambda: num_descriptors() < before)


async def test_cancelled_calls_give_everything_back(service: VisionService, server: PictureServer) -> None:
    await service.ready()
    gate = server.pages["/gate"] = Gate(png())
    close(await service.load(refs(server.url())))  # so that the connections of ordinary work are open
    before = num_descriptors()
    (decode_worker, _) = service.process_ids

    fetching = asyncio.create_task(service.load(refs(server.url("/gate"))))
    await until(lambda: len(server.requests) == 2)
    freeze(decode_worker)
    decoding = asyncio.create_task(service.load(refs(data_url(png(seed=1)))))
    waiting = asyncio.create_task(service.load(refs(data_url(png(seed=2)), data_url(png(seed=3)))))
    await until(lambda: service.stats().num_in_flight == {"fetch": 1, "decode": 3, "preprocess": 0})

    for task in (fetching, decoding, waiting):
        task.cancel()
    await asyncio.wait((fetching, decoding, waiting))

    await until(lambda: gate.num_left == 1)
    assert service.stats().num_in_flight == {"fetch": 0, "decode": 0, "preprocess": 0}
    close(await service.load(refs(data_url(png(seed=4)))))
    await until(lambda: num_descriptors() <= before + 2)  # the new cached picture's two arrays
    assert is_gone(decode_worker)


async def test_no_more_pictures_of_one_request_are_in_flight_than_allowed(server: PictureServer) -> None:
    service = unopened(max_pictures_per_request_in_flight=2)
    await service.open()
    gate = server.pages["/gate"] = Gate(png())
    call = asyncio.create_task(service.load(refs(*(server.url(f"/gate?{at}") for at in range(6)))))

    await until(lambda: len(server.requests) == 2)
    assert service.stats().num_in_flight["fetch"] == 2

    gate.is_open.set()
    images = await call
    assert [image.num_tokens for image in images] == [12] * 6
    close(images)
    await service.close()


async def test_a_cache_of_no_bytes_keeps_nothing_and_all_still_works() -> None:
    service = unopened(processed_cache_bytes=0)
    await service.open()

    for _ in range(2):
        first, second = await service.load(refs(data_url(png()), data_url(png())))
        assert np.array_equal(first.arrays["pixel_values"].numpy(), second.arrays["pixel_values"].numpy())
        close([first, second])

    assert (service.stats().num_done["preprocess"], service.stats().cache_bytes) == (2, 0)
    await service.close()


async def test_a_service_whose_workers_cannot_start_says_so() -> None:
    before = num_descriptors()
    service = unopened(model_folder="missing")
    await service.open()

    with pytest.raises(WorkerError, match="there is no such model"):
        await service.ready()
    with pytest.raises(MediaError) as caught:
        await service.load(refs(data_url(png())))

    assert (caught.value.status, caught.value.param, service.is_ready) == (503, "messages[0].content[0].image_url", False)
    await service.close()
    assert num_descriptors() == before


async def test_closing_while_the_workers_start_leaves_no_process(server: PictureServer) -> None:
    before = num_descriptors()
    service = unopened()
    await service.open()
    await until(lambda: len(service.process_ids) == 2)
    process_ids = service.process_ids

    await service.close()

    assert all(is_gone(process_id) for process_id in process_ids)
    assert num_descriptors() == before


async def test_large_pictures_take_the_same_way(service: VisionService) -> None:
    data = png(500, 400)
    assert len(data) > 256 << 10

    first, second = await service.load(refs(data_url(data), data_url(data)))

    assert (first.width, first.height, first.content_hash) == (500, 400, second.content_hash)
    assert np.array_equal(first.arrays["pixel_values"].numpy(), noise(500, 400)[::2, ::2])
    close([first, second])


async def test_a_file_that_was_fetched_before_is_not_fetched_again(service: VisionService, server: PictureServer) -> None:
    first = refs(server.url())
    [data] = await service.fetch(first, limit_bytes=1 << 20)
    server.requests.clear()

    kept = [replace(ref, url="gone:", data=data) for ref in first]
    [loaded], [measured] = await service.load(kept), await service.measure(kept)

    assert data == png()
    assert (loaded.num_tokens, loaded.layout) == (measured.num_tokens, measured.layout)
    assert server.requests == []
    assert service.stats().num_pictures == 2, "asked for by load and measure"
    close([loaded])


async def test_a_picture_of_more_tokens_than_fit_is_refused_by_its_field_or_left_out() -> None:
    service = VisionService(VisionConfig(num_decode_workers=1), model_folder="model", processor=FAKE, max_tokens=lambda: 12)
    await service.open()
    small, large = refs(data_url(png()), data_url(png(20, 10, seed=1)))

    with pytest.raises(MediaError) as refused:
        await service.load([small, large])
    loaded, left_out = await service.load([small, replace(large, may_fail=True)])

    assert (refused.value.code, refused.value.param, refused.value.status) == ("context_length_exceeded", large.param, 400)
    assert isinstance(left_out, MediaError)
    assert isinstance(loaded, ProcessedImage)
    assert loaded.num_tokens == 12
    assert [measured.num_tokens for measured in await service.measure([small, large]) if isinstance(measured, MeasuredImage)] == [12, 50]
    close([loaded])
    await service.close()


async def test_files_to_be_kept_are_fetched_up_to_a_limit_for_all_together(service: VisionService) -> None:
    pictures = refs(data_url(png(seed=1)), data_url(png(seed=2)))
    num_bytes = len(png(seed=1)) + len(png(seed=2))

    assert len(await service.fetch(pictures, limit_bytes=num_bytes)) == 2
    with pytest.raises(MediaError, match=f"more than the {num_bytes - 1} bytes") as caught:
        await service.fetch(pictures, limit_bytes=num_bytes - 1)

    assert caught.value.code == "image_too_large"
    assert caught.value.param in {ref.param for ref in pictures}


async def test_equal_files_to_be_kept_are_one_and_those_that_are_kept_take_no_room(service: VisionService, server: PictureServer) -> None:
    server.pages["/again"] = server.pages["/large"] = body(large := png(500, 400))
    known, new = png(seed=1), png(seed=2)
    pictures = refs(data_url(known), data_url(new), data_url(new), server.url("/large"), server.url("/again"))
    kept = {hashlib.sha256(known).hexdigest(): known}

    files = await service.fetch(pictures, limit_bytes=len(new) + len(large), kept=kept)

    assert files == [known, new, new, large, large]
    assert (files[0] is known, files[1] is files[2], files[3] is files[4]) == (True, True, True)
    with pytest.raises(MediaError, match="can be kept"):
        await service.fetch(pictures, limit_bytes=len(new) + len(large) - 1, kept=kept)


async def test_what_is_downloaded_to_be_kept_has_a_limit_though_it_is_the_same() -> None:
    service = VisionService(VisionConfig(max_request_picture_bytes=2 * len(png())), model_folder="model", processor=FAKE)

    assert len(await service.fetch(refs(*[data_url(png())] * 2), limit_bytes=len(png()))) == 2
    with pytest.raises(MediaError, match="--max-request-picture-bytes"):
        await service.fetch(refs(*[data_url(png())] * 3), limit_bytes=len(png()))


async def test_pictures_that_may_fail_leave_their_errors_and_the_others(service: VisionService, server: PictureServer) -> None:
    server.pages["/broken"] = body(png()[:50])
    urls = [data_url(png()), server.url("/broken"), "http://10.0.0.1/", data_url(png(20, 10, seed=1)), server.url("/missing"), "nonsense"]
    optional = [replace(ref, may_fail=True) for ref in refs(*urls)]

    loaded = await service.load(optional)

    good = [image for image in loaded if isinstance(image, ProcessedImage)]
    assert [(image.width, image.height) for image in good] == [(8, 6), (20, 10)]
    assert [(place, error.code) for place, error in enumerate(loaded) if isinstance(error, MediaError)] == [
        (1, "image_decode_failed"),
        (2, "url_blocked"),
        (4, "image_fetch_failed"),
        (5, "url_invalid"),
    ]
    assert all(error.param == ref.param for error, ref in zip(loaded, optional, strict=True) if isinstance(error, MediaError))
    assert sum(service.stats().num_failed.values()) == 4
    close(good)

    # What is asked for only in part is not given up for the rest: measuring and fetching go on too.
    measured, fetched = await service.measure(optional), await service.fetch(optional, limit_bytes=1 << 20)
    assert [isinstance(result, MediaError) for result in measured] == [False, False, True, False, True, True]
    assert [isinstance(result, MediaError) for result in fetched] == [False, False, True, False, True, True]
    two = [optional[0], optional[3]]
    assert [type(data) for data in await service.fetch(two, limit_bytes=len(png(20, 10, seed=1)))].count(MediaError) == 1

    # A worker that dies, as this one does over 13 columns, is this server's fault: nobody is told that the picture is bad.
    with pytest.raises(MediaError) as caught:
        await service.load([replace(ref, may_fail=True) for ref in refs(data_url(png()), data_url(png(13, 5)))])
    assert (caught.value.status, caught.value.param) == (503, "messages[0].content[1].image_url")
