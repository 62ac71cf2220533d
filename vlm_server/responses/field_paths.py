"""What the fields of a translated request are called in the request that the client sent.

A request of one API is made one of another before it is checked and served; what goes wrong then must name the client's own field.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from engine.request import EngineError
from vision.image import MediaError
from vlm_server.errors import ApiError, to_api_error


@dataclass(frozen=True, slots=True)
class Place:
    """A field of the client's. is_whole: what lies deeper has no name of its own there."""

    path: str
    is_whole: bool = False

    def __truediv__(self, rest: str) -> "Place":
        """The place of `rest`, which begins with a dot or a bracket."""
        return self if self.is_whole else Place(self.path + rest)


class FieldPaths:
    """Translated path → the client's: the longest known beginning is replaced."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._places = dict(places)

    def of(self, path: str) -> str:
        for length in range(len(path), 0, -1):
            if length < len(path) and path[length] not in ".[":
                continue
            place = self._places.get(path[:length])
            if place is not None:
                return (place / path[length:]).path
        return path

    def text(self, message: str) -> str:
        """A sentence that begins with `path: `."""
        path, colon, rest = message.partition(": ")
        return f"{self.of(path)}{colon}{rest}" if colon and " " not in path else message

    def error(self, error: ApiError) -> ApiError:
        if error.param is None:
            return error
        return ApiError(error.status, error.code, self.text(error.message), param=self.of(error.param), headers=error.headers)

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """What is raised inside names the client's fields."""
        try:
            yield
        except (ApiError, MediaError, EngineError) as error:
            raise self.error(to_api_error(error)) from error
