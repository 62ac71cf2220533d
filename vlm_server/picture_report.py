"""What became of a request's pictures, for its answer: which were left out and why, and what the model saw of the others.

Made where a request begins, filled while its prompt is made, read when the answer is written. Knows nothing of HTTP or of how pictures
are loaded.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from vision.image import ImageRef, MediaError, ProcessedImage

Result = TypeVar("Result")


@dataclass(slots=True)
class PictureReport:
    """Of one request.

    may_fail: pictures that cannot be used are left out of the prompt. wants_sizes: the answer says what the model saw. params: of the
    pictures that both are about; None: of all.
    """

    may_fail: bool = False
    wants_sizes: bool = False
    params: Collection[str] | None = None
    lost: dict[str, MediaError] = field(default_factory=dict)  # by URL: pictures that cannot be had, found before they are loaded
    left_out: list[MediaError] = field(default_factory=list)  # in the order of the pictures, each with its `param`
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # `param`, and what is said of the picture

    @classmethod
    def of(cls, on_media_error: str | None, return_image_sizes: bool | None = None) -> "PictureReport":
        """As the request's fields of these names ask for it."""
        return cls(on_media_error == "skip", bool(return_image_sizes))

    def covers(self, ref: ImageRef) -> bool:
        return self.params is None or ref.param in self.params

    async def gather(
        self, refs: Sequence[ImageRef], work: Callable[[list[ImageRef]], Awaitable[list[Result | MediaError]]]
    ) -> list[Result | MediaError]:
        """What `work` makes of the pictures, in their order; of lost ones their errors."""
        results = await work([ref for ref in refs if ref.url not in self.lost])
        rest = iter(results)
        return [_named(self.lost[ref.url], ref.param) if ref.url in self.lost else next(rest) for ref in refs]

    def take(self, refs: Sequence[ImageRef], results: Sequence[Result | MediaError]) -> list[Result]:
        """The results that are no errors; those of the others are told to the client."""
        for ref, result in zip(refs, results, strict=True):
            if isinstance(result, ProcessedImage) and self.covers(ref):
                self.seen.append((ref.param, _size(result)))
        self.left_out += [result for result in results if isinstance(result, MediaError)]
        return [result for result in results if not isinstance(result, MediaError)]

    def warnings(self) -> list[str]:
        """`field: code: sentence` for each picture that was left out."""
        return [f"{error.param}: {error.code}: {error.message}; the picture is left out" for error in self.left_out]

    def fields(self, name_of: Callable[[str], str] = str) -> dict[str, Any]:
        """What the answer says beside its usage. name_of: what the client calls a field."""
        return {"image_sizes": [{"param": name_of(param), **size} for param, size in self.seen]} if self.wants_sizes else {}


def _named(error: MediaError, param: str) -> MediaError:
    return MediaError(error.code, error.message, param=param, status=error.status)


def _size(image: ProcessedImage) -> dict[str, Any]:
    views = [asdict(view) for view in image.views]
    return {"width": image.width, "height": image.height, "seen": views[0] if views else None, "tiles": views[1:]}
