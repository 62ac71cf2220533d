"""What pictures hold of the budgets at each point of their way, who is kept out by whom, and that everything is given back."""

import asyncio
import errno
import os
import resource
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from aiohttp import web

from tests.vision.picture_server import Gate, PictureServer
from tests.vision.pictures import data_url, png
from tests.vision.processes import await_end, descriptors_left, freeze, num_descriptors, until
from tests.vision.test_service import FAKE, close, refs, unopened
from vision.config import VisionConfig
from vision.image import ImageRef, MediaError, salted_hash
from vision.media_budgets import Holding, held_by
from vision.request_room import RequestRoom
from vision.service import VisionService

PICTURE = len(png())  # bytes
PIXELS = 8 * 6
ARRAYS = -(-(3 * 4 * 3 + 2 * 8) // 3)  # pixels that the fake processor's arrays count for


@pytest.fixture
async def server() -> AsyncIterator[PictureServer]:
    server = PictureServer()
    await server.open()
    yield server
    await server.close()


@pytest.fixture
async def service(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[VisionService]:
    """At most 1000 pixels in flight, 750 for one owner, and 200 descriptors, 150 for one; nobody waits for room."""

    async def look_up(host: str) -> list[str]:
        return ["127.0.0.1"]

    limits: dict[str, Any] = {"max_pixels_in_flight": 1000, "budget_wait_s": 0.0, "max_downloads": 20, "processed_cache_pictures": 0}
    config = VisionConfig(allow_private_media=("127.0.0.0/8",), num_decode_workers=1, **limits)
    with monkeypatch.context() as patched:
        patched.setattr(resource, "getrlimit", lambda which: (800, 4096))
        service = VisionService(config, model_folder="model", processor=FAKE, look_up=look_up)
    await service.open()
    await service.ready()
    yield service
    await service.close()


@contextmanager
def request(service: VisionService, owner: str) -> Iterator[Holding]:
    holding = Holding(service._budgets, owner)
    with held_by(holding):
        yield holding


async def load(service: VisionService, owner: str, *pictures: ImageRef) -> None:
    """A request that needs its pictures no longer than it takes to load them."""
    with request(service, owner):
        close(await service.load(pictures))


def used(service: VisionService) -> dict[str, int]:
    return {name: stats.used for name, stats in service.stats().budgets.items()}


def nothing_is_held(service: VisionService) -> bool:
    return all(stats.used == stats.num_waiting == 0 for stats in service.stats().budgets.values())


class Trickle(Gate):
    """Sends half of a picture, and the rest when the gate is opened; says that it is very long."""

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(png()[: PICTURE // 2])
        await self.is_open.wait()
        await response.write(png()[PICTURE // 2 :])
        return response


async def test_what_pictures_hold_on_their_way_and_that_it_is_given_back_however_it_ends(
    service: VisionService, server: PictureServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One walk in one service, because each start of a preprocessing worker takes seconds."""
    decode_worker, preprocess_worker = service.process_ids

    # Bytes count as they arrive; requests that share a download count them once.
    trickle = server.pages["/trickle"] = Trickle(b"")
    loading = [asyncio.create_task(load(service, "a", *refs(server.url("/trickle")))) for _ in range(3)]
    await until(lambda: used(service)["media_bytes"] > 0)
    assert used(service) == {"media_bytes": PICTURE // 2, "pixels": 0, "descriptors": 0, "downloads": 1}
    freeze(decode_worker)
    trickle.is_open.set()

    # The whole file counts until its picture is processed, its pixels from before they exist.
    await until(lambda: service.stats().num_in_flight["decode"] == 1)
    assert used(service) == {"media_bytes": PICTURE, "pixels": 0, "descriptors": 0, "downloads": 0}
    thaw(decode_worker)
    await asyncio.gather(*loading)
    assert nothing_is_held(service)

    # What was processed counts until the engine has it or the request ends, once for all requests that hold it.
    with request(service, "a") as first, request(service, "a"):
        close(await service.load(refs(data_url(png()), data_url(png()))))
        assert used(service) == {"media_bytes": 0, "pixels": ARRAYS, "descriptors": 2, "downloads": 0}
        first.give_arrays([bytes(32)])
        assert used(service)["pixels"] == ARRAYS, "the engine has another picture"
    assert nothing_is_held(service)
    with request(service, "a") as holding:
        images = await service.load(refs(data_url(png())))
        holding.give_arrays(image.content_hash for image in images)
        assert used(service) == {"media_bytes": 0, "pixels": 0, "descriptors": 2, "downloads": 0}, "the engine may need them again"
        close(images)
        images = await service.load(refs(data_url(png())), tenant="alice")
        holding.give_arrays(salted_hash(image.content_hash, "alice") for image in images)  # as her prompt names them
        assert used(service) == {"media_bytes": 0, "pixels": 0, "descriptors": 4, "downloads": 0}
        close(images)
    assert nothing_is_held(service)

    # A client that leaves, at each stage.
    gate = server.pages["/gate"] = Gate(png())
    fetching = asyncio.create_task(load(service, "a", *refs(server.url("/gate"))))
    await until(lambda: used(service)["downloads"] == 1)
    await leave(fetching, service)
    freeze(decode_worker)
    decoding = asyncio.create_task(load(service, "a", *refs(*(data_url(png(seed=seed)) for seed in range(5)))))
    await until(lambda: used(service)["media_bytes"] > 0)
    await leave(decoding, service)
    await until(lambda: gate.num_left == 1)
    thaw(decode_worker)
    freeze(preprocess_worker)
    preprocessing = asyncio.create_task(load(service, "a", *refs(data_url(png(seed=6)))))
    await until(lambda: service.stats().num_in_flight["preprocess"] == 1)
    assert used(service)["pixels"] == PIXELS
    await leave(preprocessing, service)
    thaw(preprocess_worker)

    # Failures: of the fetch, of the file, of the model's processor, and of both kinds of workers.
    server.pages["/long"] = lambda request: _answer(web.Response(body=bytes(30 << 20)))
    for bad in (server.url("/missing"), server.url("/long"), data_url(png()[:50]), "data:image/png;base64,?", data_url(png(seed=7))):
        with pytest.raises(MediaError):
            await load(service, "a", *refs(data_url(png(seed=8)), bad, detail="high" if bad == data_url(png(seed=7)) else "auto"))
        assert nothing_is_held(service), bad
    with monkeypatch.context() as patched:
        patched.setattr(os, "memfd_create", no_descriptors)
        with pytest.raises(MediaError, match="no file descriptors left") as caught:
            await load(service, "a", *refs(data_url(png(seed=11))))
    assert (caught.value.code, caught.value.status, caught.value.param) == ("server_busy", 503, "messages[0].content[0].image_url")
    assert nothing_is_held(service)
    freeze(preprocess_worker)
    refused = asyncio.create_task(load(service, "a", *refs(data_url(png(seed=12)))))
    await until(lambda: service.stats().num_in_flight["preprocess"] == 1)
    with descriptors_left(1):
        thaw(preprocess_worker)
        with pytest.raises(MediaError, match="no file descriptors left") as caught:
            await refused
    assert (caught.value.code, caught.value.status, caught.value.param) == ("server_busy", 503, "messages[0].content[0].image_url")
    assert nothing_is_held(service)
    await load(service, "a", *refs(data_url(png(seed=12))))
    assert service.process_ids[1] == preprocess_worker, "it did its job"
    with pytest.raises(MediaError, match="broke down"):
        await load(service, "a", *refs(data_url(png(13, 2))))  # kills the preprocessing worker
    assert nothing_is_held(service)
    await service.load(refs(data_url(png(seed=9))))
    (decode_worker, _) = service.process_ids
    freeze(decode_worker)
    dying = asyncio.create_task(load(service, "a", *refs(data_url(png(seed=10)))))
    await until(lambda: service.stats().num_in_flight["decode"] == 1)
    kill(decode_worker)
    await dying  # another worker does it
    assert nothing_is_held(service)


async def test_equal_pictures_are_in_memory_once_though_no_cache_has_them(service: VisionService) -> None:
    same = refs(data_url(png()))
    close(await service.load(refs(data_url(png(seed=1)))))
    before, num_done = num_descriptors(), service.stats().num_done["preprocess"]

    # However many requests have it, one after another, before and after the engine has begun with it.
    with ExitStack() as requests:
        images: list[Any] = []
        for _ in range(2):
            holding = requests.enter_context(request(service, "a"))
            images += await service.load(same)
            holding.give_arrays([images[0].content_hash])
            assert used(service)["pixels"] == 0
        for _ in range(2):
            requests.enter_context(request(service, "a"))
            images += await service.load(same)
        assert used(service) == {"media_bytes": 0, "pixels": ARRAYS, "descriptors": 2, "downloads": 0}
        assert len({shared.fd for image in images for shared in image.arrays.values()}) == 2
        assert num_descriptors() == before + 2
        assert service.stats().num_done["preprocess"] == num_done + 1

        # Another tenant's is another, and so is one with other options.
        others = [*await service.load(same, tenant="b"), *await service.load(refs(data_url(png()), max_pixels=100))]
        assert len({shared.fd for image in images + others for shared in image.arrays.values()}) == 6
        assert (used(service)["descriptors"], service.stats().num_done["preprocess"]) == (6, num_done + 3)

        # It is there until the last one closes it, and then for nobody.
        close(images[:3] + others)
        assert images[3].arrays["sizes"].numpy().tolist() == [3, 4]
        close(images)
        assert num_descriptors() == before
        close(await service.load(same))
        assert service.stats().num_done["preprocess"] == num_done + 4
    assert nothing_is_held(service)

    # More of them in one request than are worked on at once.
    images = await service.load(same * 12)
    assert (num_descriptors(), service.stats().num_done["preprocess"]) == (before + 2, num_done + 5)
    close(images)

    # Whoever is refused or leaves before it is handed out has none, whatever is kept of the error.
    with pytest.raises(MediaError) as caught:
        await service.load(same, room=RequestRoom(VisionConfig(max_request_pixels=PIXELS - 1)))
    assert (caught.value.code, num_descriptors()) == ("image_too_large", before)
    service._budgets.descriptors._wait_s = None
    with await service._budgets.descriptors.reserve(200):
        leaving = asyncio.create_task(load(service, "a", *same))
        await until(lambda: service.stats().budgets["descriptors"].num_waiting > 0)
        following = asyncio.create_task(load(service, "b", *same))
        await until(lambda: service.stats().budgets["descriptors"].num_waiting > 1)
        assert num_descriptors() == before + 2
        leaving.cancel()
        await asyncio.wait((leaving,))
    await following
    assert nothing_is_held(service)
    assert num_descriptors() == before


async def test_who_finds_no_room_is_told_to_come_again_and_others_are_not_kept_out(service: VisionService, server: PictureServer) -> None:
    # One owner's slow hosts: it takes 15 of 20 downloads, each host 12 of 16, and everybody else's pictures come through.
    for host in range(2):
        server.pages[f"/gate{host}"] = Gate(png())
    slow = [
        asyncio.create_task(load(service, "greedy", *refs(*(server.url(f"/gate{host}?{call}.{at}", host=name) for at in range(8)))))
        for host, name in enumerate(("one.example", "two.example"))
        for call in range(2)
    ]
    await until(lambda: any(task.done() for task in slow) or used(service)["downloads"] == 15)
    for picture in (server.url(), server.url(host="three.example"), data_url(png())):
        await load(service, "modest", *refs(picture))
    await load(service, "greedy", *refs(data_url(png(seed=1))))

    # Who asks for more than its share is told when to come again, by the name of its part of the request.
    results = await asyncio.gather(*(task for task in slow if task.done()), return_exceptions=True)
    assert results, "all of them found room"
    for error in results:
        assert isinstance(error, MediaError)
        assert (error.code, error.status) == ("server_busy", 503)
        assert str(error.param).startswith("messages[0].content[")
        assert error.retry_after_s in range(1, 61)
    assert service.stats().budgets["downloads"].num_refused > 0
    for task in slow:
        task.cancel()
    await asyncio.wait(slow)
    await until(lambda: nothing_is_held(service))

    # Pixels: one owner's requests that the engine has not taken over leave a quarter to others.
    with request(service, "greedy"):
        images = await service.load(refs(data_url(png(25, 25))))
        assert used(service)["pixels"] == 175, "the fake processor halves it"
        with pytest.raises(MediaError, match=r"175 of 1000 pixels \(--max-pixels-in-flight\) are in use"):
            await service.load(refs(data_url(png(30, 20))))
        await load(service, "modest", *refs(data_url(png(20, 10))))
    await load(service, "greedy", *refs(data_url(png(30, 20))))
    close(images)
    assert nothing_is_held(service)

    # Descriptors, two for each picture: until their requests end, though the engine has the pictures.
    with request(service, "greedy") as holding:
        for at in range(0, 75, 15):
            images = await service.load(refs(*(data_url(png(2, 2, seed=at + seed)) for seed in range(15))))
            holding.give_arrays(image.content_hash for image in images)
            close(images)
        assert used(service) == {"media_bytes": 0, "pixels": 0, "descriptors": 150, "downloads": 0}
        with pytest.raises(MediaError, match=r"150 of 200 file descriptors for pictures \(nofile\) are in use") as caught:
            await service.load(refs(data_url(png(2, 3))))
        assert (caught.value.code, caught.value.status) == ("server_busy", 503)
        await load(service, "greedy", *refs(data_url(png(2, 2, seed=3))))  # is held already
        await load(service, "modest", *refs(data_url(png(2, 3))))
    await load(service, "greedy", *refs(data_url(png(2, 3))))
    assert nothing_is_held(service)

    # Pictures of one request wait for each other: of these there is room for one.
    service._budgets.pixels._wait_s = 5.0
    await load(service, "greedy", *refs(data_url(png(24, 24)), data_url(png(24, 24, seed=1))))

    # The workers are not one owner's either: a picture does not wait behind all of those that another sent before it.
    (decode_worker, _) = service.process_ids
    freeze(decode_worker)
    num_done = service.stats().num_done["preprocess"]
    many = [
        asyncio.create_task(load(service, "greedy", *refs(*(data_url(png(2, 2, seed=16 * call + at)) for at in range(16)))))
        for call in range(5)
    ]
    await until(lambda: service.stats().num_in_flight["decode"] > 16)
    other = asyncio.create_task(load(service, "modest", *refs(data_url(png(2, 3)))))
    await until(lambda: service.stats().budgets["media_bytes"].used > 0)
    thaw(decode_worker)
    await other
    assert service.stats().num_done["preprocess"] - num_done < 10, "in order of arrival it would be behind twenty"
    await asyncio.gather(*many)
    assert nothing_is_held(service)

    # Nor behind those that are only measured, to count tokens.
    (_, preprocess_worker) = service.process_ids
    freeze(preprocess_worker)
    places = service._preprocess_pool._places
    sizes = refs(*(data_url(png(2, 2, seed=at)) for at in range(16)))
    counting = [asyncio.create_task(measure(service, "greedy", *sizes)) for _ in range(5)]
    await until(lambda: places.num_waiting > 16)
    other = asyncio.create_task(load(service, "modest", *refs(data_url(png(2, 4)))))
    await until(lambda: places.used == places.limit)
    thaw(preprocess_worker)
    await other
    assert not any(task.done() for task in counting), "in order of arrival it would be behind all pictures of one of them"
    await asyncio.gather(*counting)
    assert nothing_is_held(service)


async def test_files_that_are_kept_count_until_their_request_ends(server: PictureServer) -> None:
    service = unopened()
    await service._fetcher.open()
    with request(service, "a"):
        kept = await service.fetch(refs(server.url(), data_url(png(seed=1))), limit_bytes=1 << 20)

        assert used(service)["media_bytes"] == sum(map(len, kept))
        again = [ImageRef("", "p", data=data) for data in kept]
        await service.fetch(again, limit_bytes=1 << 20)
        assert used(service)["media_bytes"] == sum(map(len, kept)), "what came with the request is counted there"

    assert nothing_is_held(service)
    await service._fetcher.close()


async def measure(service: VisionService, owner: str, *pictures: ImageRef) -> None:
    with request(service, owner):
        await service.measure(pictures)


def no_descriptors(*_: object) -> int:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


async def leave(task: "asyncio.Task[Any]", service: VisionService) -> None:
    task.cancel()
    await asyncio.wait((task,))
    await asyncio.sleep(0)  # the shared run of a picture's work ends a moment after its last caller
    await until(lambda: nothing_is_held(service))


async def _answer(response: web.Response) -> web.Response:
    return response


def thaw(process_id: int) -> None:
    os.kill(process_id, signal.SIGCONT)


def kill(process_id: int) -> None:
    os.kill(process_id, signal.SIGKILL)
    await_end(process_id)
