"""Announced pictures as plain bookkeeping."""

from engine.announced import AnnouncedImages
from engine.request import ImageInput


def image(name: str) -> ImageInput:
    return ImageInput(name.encode(), 1, {})


def names(announced: AnnouncedImages) -> list[str]:
    return [image.content_hash.decode() for image in announced.needed()]


def test_pictures_are_needed_once_in_the_order_in_which_they_came() -> None:
    announced = AnnouncedImages()
    for owner, name in (("a", "x"), ("b", "y"), ("b", "x"), ("a", "z")):
        announced.announce(owner, image(name))

    assert names(announced) == ["x", "z", "y"]


def test_a_picture_stays_as_long_as_one_owner_has_it() -> None:
    announced = AnnouncedImages()
    announced.announce("a", image("x"))
    announced.announce("b", image("x"))

    announced.withdraw("a")

    assert announced.has(b"x")
    announced.withdraw("b")
    announced.withdraw("never")
    assert not announced.has(b"x")
    assert not announced


def test_what_was_encoded_is_not_announced_again_and_what_failed_may_be() -> None:
    announced = AnnouncedImages()
    for name in ("encoded", "failed"):
        announced.announce("a", image(name))

    announced.encoded(b"encoded")
    announced.tried(b"failed")

    assert not announced
    announced.announce("b", image("encoded"))
    announced.announce("b", image("failed"))
    assert names(announced) == ["failed"]


def test_only_so_many_encoded_pictures_are_remembered(monkeypatch) -> None:
    monkeypatch.setattr("engine.announced.MAX_REMEMBERED", 2)
    announced = AnnouncedImages()
    for name in ("x", "y", "x", "z"):
        announced.encoded(name.encode())

    for name in "xyz":
        announced.announce("a", image(name))

    assert names(announced) == ["y"]
