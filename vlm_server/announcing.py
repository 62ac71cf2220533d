"""Pictures of a prompt are announced to the engine one by one, as they are loaded. Knows nothing of how that is done or what follows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from engine.request import ImageInput
from vision.image import ProcessedImage


class Announcement(Protocol):
    """See `engine.announcing.Announcement`."""

    def add(self, image: ImageInput) -> None: ...

    def end(self, *, request_follows: bool) -> None: ...


OpenAnnouncement = Callable[[], Announcement]


@contextmanager
def announcing(
    open_announcement: OpenAnnouncement | None, num_pictures: int, as_input: Callable[[ProcessedImage], ImageInput]
) -> Iterator[Callable[[ProcessedImage], None] | None]:
    """What to call with each picture that is loaded within; None where the engine would hear of it no sooner than of the request.

    The last one is not announced: the request follows at once. Where the block fails, so does the head start of all others.
    """
    if open_announcement is None or num_pictures < 2:
        yield None
        return
    announcement, num_missing = open_announcement(), num_pictures

    def on_loaded(image: ProcessedImage) -> None:
        nonlocal num_missing
        num_missing -= 1
        if num_missing:
            announcement.add(as_input(image))

    try:
        yield on_loaded
    except BaseException:
        announcement.end(request_follows=False)
        raise
    announcement.end(request_follows=True)
