from collections.abc import Awaitable, Callable

import pytest

from tests.vision.pictures import data_url, png
from tests.vision.processes import num_descriptors, until
from tests.vision.test_service import close, refs, unopened
from vision.config import VisionConfig
from vision.image import MediaError
from vision.request_room import RequestRoom


def test_a_room_gives_as_much_as_it_has_and_no_more() -> None:
    room = RequestRoom(VisionConfig(max_request_picture_bytes=10, max_request_pixels=20))
    room.take_bytes(10)
    room.take_pixels(20)

    with pytest.raises(MediaError, match=r"10 bytes.*--max-request-picture-bytes"):
        room.take_bytes(1)
    with pytest.raises(MediaError, match=r"20 pixels.*--max-request-pixels"):
        room.take_pixels(1)


async def test_the_pictures_of_a_request_share_its_bytes_and_pixels() -> None:
    picture, other = png(20, 10, seed=1), png(20, 10, seed=2)
    service = unopened(max_request_pixels=400, max_request_picture_bytes=len(picture) + len(other))
    urls = [data_url(picture), data_url(other)]
    await service.open()
    try:
        close(await service.load(refs(*urls)))  # all of both limits
        assert len(await service.measure(refs(*urls))) == 2
        num_before = num_descriptors()

        for work in (service.load, service.measure):
            assert await refused(lambda work=work: work(refs(*urls, data_url(png(1, 1))))) == "messages[0].content[2].image_url"  # type: ignore[misc]
        room = service.request_room()
        close(await service.load(refs(*urls), room=room))
        assert await refused(lambda: service.load(refs(data_url(png(1, 1))), room=room)) == "messages[0].content[0].image_url"
        await until(lambda: num_descriptors() == num_before)  # a worker may still look at what nobody waits for
    finally:
        await service.close()


async def refused(call: Callable[[], Awaitable[object]]) -> str | None:
    """The field that the refusal names."""
    with pytest.raises(MediaError) as caught:
        await call()
    assert caught.value.code == "image_too_large"
    return caught.value.param
