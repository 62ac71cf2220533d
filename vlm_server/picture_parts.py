"""The pictures of messages, each with what the request says about its resolution.

Per picture: `detail`, `min_pixels` and `max_pixels`, inside `image_url` or beside it. For all of them: `mm_processor_kwargs`, which a
picture's own fields go before. Every refusal names the field. Knows nothing of templates and of how pictures are loaded.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.request import InvalidRequestError
from vision.config import MAX_PICTURE_PIXELS
from vision.families import Family
from vision.image import ImageOptions, ImageRef
from vlm_server.chat_template import Message

_PIXELS = ("min_pixels", "max_pixels")
_FIELD = "mm_processor_kwargs"


@dataclass(frozen=True, slots=True)
class PictureParts:
    """Reads the pictures of one model's requests. family: None where it takes none."""

    family: Family | None
    max_picture_pixels: int = MAX_PICTURE_PIXELS

    def defaults(self, settings: Mapping[str, Any] | None) -> ImageOptions:
        """What `mm_processor_kwargs` asks of every picture. Raises InvalidRequestError where this model has no such setting."""
        if not settings:
            return ImageOptions()
        if self.family is None:
            raise InvalidRequestError(f"{_FIELD}: this model takes no pictures")
        pixels: dict[str, int] = {}
        own: dict[str, Any] = {}
        paths: dict[str, str] = {}
        for name, value, path in _flat(settings):
            name = self.family.rules.resolution.other_names.get(name, name)
            if (pixels if name in _PIXELS else own).setdefault(name, value) != value:
                raise InvalidRequestError(f"{path}: {name} is given twice, with another value; give one of the two")
            paths[name] = path
            if name in _PIXELS:
                self._check_pixels(value, path)
            else:
                self._check_setting(name, value, path)
        least, most = (pixels.get(name) for name in _PIXELS)
        _check_order(least, most, paths.get("max_pixels", _FIELD))
        return ImageOptions(min_pixels=least, max_pixels=most, settings=_nested(own))

    def split(self, messages: Sequence[Message], names: Mapping[str, str], defaults: ImageOptions) -> tuple[list[ImageRef], list[Message]]:
        """The pictures in order, and the messages with a part `{"type": "image"}` in place of each.

        names: `messages[0].content[1].image_url` to the field that the client knows.
        """
        refs: list[ImageRef] = []
        plain: list[Message] = []
        for number, message in enumerate(messages):
            content = message.get("content")
            if isinstance(content, list):
                paths = (f"messages[{number}].content[{index}].image_url" for index in range(len(content)))
                content = [self.plain(part, names.get(path, path), refs, defaults) for part, path in zip(content, paths, strict=True)]
            plain.append({**message, "content": content})
        return refs, plain

    @staticmethod
    def without(messages: Sequence[Message], left_out: Collection[int]) -> list[Message]:
        """The messages of `split` without the pictures of these numbers. A message that has nothing else keeps an empty text."""
        numbers = itertools.count()
        kept: list[Message] = []
        for message in messages:
            content = message["content"]
            if isinstance(content, list):
                parts = [part for part in content if part["type"] == "text" or next(numbers) not in left_out]
                content = parts or (content and [{"type": "text", "text": ""}])
            kept.append({**message, "content": content})
        return kept

    def plain(self, part: dict[str, Any], param: str, refs: list[ImageRef], defaults: ImageOptions) -> dict[str, Any]:
        """The part as a template takes it. A picture is added to `refs`; `param` is its field."""
        if part["type"] != "image_url":
            return {"type": "text", "text": part["text"]}
        image = part["image_url"]
        refs.append(ImageRef(url=image["url"], param=param, options=self._options(part, param, defaults)))
        return {"type": "image"}

    def _options(self, part: dict[str, Any], param: str, defaults: ImageOptions) -> ImageOptions:
        image, path = part["image_url"], param.removesuffix(".image_url")
        places = [
            (holder.get(name), name, f"{where}.{name}")
            for name in _PIXELS
            for holder, where in ((part, path), (image, f"{path}.image_url"))
        ]
        asked: dict[str, tuple[int, str]] = {}
        for value, name, where in places:
            if value is None:
                continue
            self._check_pixels(value, where)
            if asked.setdefault(name, (value, where))[0] != value:
                raise InvalidRequestError(f"{where}: given beside image_url too, with another value; give one of the two")
        least, _ = asked.get("min_pixels", (defaults.min_pixels, ""))
        most, _ = asked.get("max_pixels", (defaults.max_pixels, ""))
        for _, where in asked.values():
            _check_order(least, most, where)
        return ImageOptions(image.get("detail") or defaults.detail, least, most, defaults.settings)

    def _check_pixels(self, value: int, path: str) -> None:
        if value > self.max_picture_pixels:
            raise InvalidRequestError(f"{path}: at most the {self.max_picture_pixels} pixels that a picture may have are allowed")

    def _check_setting(self, name: str, value: Any, path: str) -> None:
        assert self.family is not None
        resolution = self.family.rules.resolution
        if name not in resolution.settings:
            known = ", ".join([*_PIXELS, *resolution.other_names, *resolution.settings])
            raise InvalidRequestError(f"{path}: no setting of this model's image processor; those that requests may change are {known}")
        bounds = resolution.settings[name]
        if bounds is not None and not bounds[0] <= value <= bounds[1]:
            raise InvalidRequestError(f"{path}: only {bounds[0]} … {bounds[1]} is allowed")


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Name, value and path of each setting; those of `image` are like those beside it."""
    for key, value in sorted(settings.items()):
        if key == "image":
            yield from ((name, inner, f"{_FIELD}.image.{name}") for name, inner, _ in _flat(value))
        elif isinstance(value, Mapping):
            yield from ((f"{key}.{name}", inner, f"{_FIELD}.{key}.{name}") for name, inner in sorted(value.items()))
        else:
            yield key, value, f"{_FIELD}.{key}"


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`size.longest_edge` as the image processor takes it; sorted, so that equal settings are equally hashed."""
    nested: dict[str, Any] = {}
    for name, value in sorted(settings.items()):
        outer, _, inner = name.partition(".")
        if inner:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[outer] = value
    return nested


def _check_order(least: int | None, most: int | None, path: str) -> None:
    if least is not None and most is not None and least > most:
        raise InvalidRequestError(f"{path}: the least, {least}, is more than the most, {most} pixels")
