"""A request's pictures, loaded for its prompt: counted, announced ahead to the engine, and those that may fail left out.

What stands between the pipeline and the vision service. Knows nothing of templates and of tokens.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from engine.request import ImageInput, InvalidRequestError
from vision.image import ImageRef, MeasuredImage, MediaError, ProcessedImage
from vision.request_room import RequestRoom
from vlm_server.announcing import OpenAnnouncement, announcing
from vlm_server.metering import admit_pictures, charge_pixels
from vlm_server.picture_report import PictureReport
from vlm_server.stage_timings import StageTimings


class ImagesNotSupportedError(InvalidRequestError):
    """A picture was sent to a model that takes none."""

    def __init__(self, param: str) -> None:
        super().__init__(f"{param}: this model takes no pictures, only text parts are allowed")
        self.param = param


class ImageLoader(Protocol):
    """What the pipeline asks of the vision service."""

    def request_room(self) -> RequestRoom: ...

    async def load(
        self,
        refs: Sequence[ImageRef],
        *,
        tenant: str = "",
        room: RequestRoom | None = None,
        on_loaded: Callable[[ProcessedImage], None] | None = None,
    ) -> list[ProcessedImage | MediaError]: ...

    async def measure(self, refs: Sequence[ImageRef], *, tenant: str = "") -> list[MeasuredImage | MediaError]: ...

    async def fetch(
        self, refs: Sequence[ImageRef], *, limit_bytes: int, tenant: str = "", kept: Mapping[str, bytes] | None = None
    ) -> list[bytes | MediaError]: ...


class PictureLoading:
    """One model's. images: None for a model that takes no pictures: ImagesNotSupportedError is raised for each then.

    announce: for pictures that are loaded before others of their prompt; None: nobody hears of them before the prompt is made.
    """

    def __init__(self, images: ImageLoader | None, *, announce: OpenAnnouncement | None = None) -> None:
        self._images = images
        self._announce = announce

    def check_supported(self, refs: Sequence[ImageRef]) -> None:
        if refs:
            self._loader(refs)

    def request_room(self) -> RequestRoom | None:
        """What the pictures of several `parts_prompt` of one request share; None where there are no pictures."""
        return self._images.request_room() if self._images is not None else None

    async def fetch(
        self, refs: Sequence[ImageRef], *, limit_bytes: int, salt: str, report: PictureReport, kept: Mapping[str, bytes] | None = None
    ) -> list[bytes | None]:
        """The files of pictures that are to be kept, at most `limit_bytes` together without those that are `kept`. Raises MediaError.

        None: one that may fail; the report knows it as lost from now on, so that no prompt has it.
        """
        if not refs:
            return []
        images = self._loader(refs)
        admit_pictures()
        files = await report.gather(
            held(refs, None, report), lambda wanted: images.fetch(wanted, limit_bytes=limit_bytes, tenant=salt, kept=kept)
        )
        report.lost |= {ref.url: file for ref, file in zip(refs, files, strict=True) if isinstance(file, MediaError)}
        return [None if isinstance(file, MediaError) else file for file in files]

    async def check_header(self, ref: ImageRef, *, salt: str) -> None:
        """Raises MediaError where the picture cannot be used, as far as its header tells; one of more tokens than fit a prompt passes."""
        await self._loader([ref]).measure([ref], tenant=salt)

    async def load(
        self,
        refs: Sequence[ImageRef],
        *,
        salt: str,
        as_input: Callable[[ProcessedImage], ImageInput],
        timings: StageTimings,
        report: PictureReport,
        room: RequestRoom | None = None,
    ) -> list[ProcessedImage | MediaError]:
        """The pictures in order, in place of one that may fail its error. The caller closes their arrays, or gives them to the engine.

        as_input: a picture as the prompt will have it. room: of the request, where it has other pictures. Raises MediaError.
        """
        if not refs:
            return []
        images = self._loader(refs)
        admit_pictures()
        with timings.stage("pictures"), announcing(self._announce, len(refs), as_input) as announce:

            def on_loaded(image: ProcessedImage) -> None:
                charge_pixels(image.width * image.height)  # now: another one may fail, or the client leave
                if announce is not None:
                    announce(image)

            results = await report.gather(refs, lambda wanted: images.load(wanted, tenant=salt, room=room, on_loaded=on_loaded))
        for image in results:
            if isinstance(image, ProcessedImage):
                timings.add_slowest("picture", image.timings_s)
        return results

    async def measure(self, refs: Sequence[ImageRef], *, salt: str, report: PictureReport) -> list[MeasuredImage | MediaError]:
        """What the pictures take of a prompt; in place of one that may fail its error."""
        if not refs:
            return []
        images = self._loader(refs)
        return await report.gather(refs, lambda wanted: images.measure(wanted, tenant=salt))

    def _loader(self, refs: Sequence[ImageRef]) -> ImageLoader:
        """What loads these pictures. Raises ImagesNotSupportedError."""
        if self._images is None:
            raise ImagesNotSupportedError(refs[0].param)
        return self._images


@contextlib.contextmanager
def closing_on_error(images: Sequence[ProcessedImage]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for array in (array for image in images for array in image.arrays.values()):
            array.close()
        raise


def held(refs: Sequence[ImageRef], pictures: Mapping[str, bytes] | None, report: PictureReport) -> list[ImageRef]:
    """The pictures with the files that are here already, and whether the others go on without them."""
    files = pictures or {}
    return [replace(ref, data=files.get(ref.url, ref.data), may_fail=report.may_fail and report.covers(ref)) for ref in refs]


def failed(results: Sequence[object]) -> frozenset[int]:
    """The numbers of the pictures that are left out."""
    return frozenset(number for number, result in enumerate(results) if isinstance(result, MediaError))
