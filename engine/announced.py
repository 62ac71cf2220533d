"""Pictures that the engine hears of before their request: encoded ahead, when no request needs the encoder.

Only pictures that were not encoded lately: one that was may be in the embedding cache or, as the prefix cache has it, not be needed at all,
which the prompt alone can tell. Plain bookkeeping; bounds on how much is announced are kept by who announces (`engine.announcing`).
"""

from collections import OrderedDict

from engine.request import ImageInput

MAX_REMEMBERED = 16384  # content hashes of pictures that were encoded: far more than the prefix cache has room for


class AnnouncedImages:
    """By their owners, each of whom stands for a prompt that is being made. Truthy while a picture is left to encode."""

    def __init__(self) -> None:
        self._images: dict[str, dict[bytes, ImageInput]] = {}
        self._encoded: OrderedDict[bytes, None] = OrderedDict()  # least recently first

    def __bool__(self) -> bool:
        return bool(self._images)

    def announce(self, owner: str, image: ImageInput) -> None:
        """Holds the picture's arrays until it is encoded or withdrawn."""
        if image.content_hash not in self._encoded:
            self._images.setdefault(owner, {})[image.content_hash] = image

    def withdraw(self, owner: str) -> None:
        """Forget what is left of the owner's pictures."""
        self._images.pop(owner, None)

    def needed(self) -> list[ImageInput]:
        """Each picture once, in the order in which owners and their pictures came."""
        return list({key: image for images in self._images.values() for key, image in images.items()}.values())

    def has(self, content_hash: bytes) -> bool:
        return any(content_hash in images for images in self._images.values())

    def tried(self, content_hash: bytes) -> None:
        """The encoder had it, for a request or for an owner: it is not announced any more."""
        for owner in [owner for owner, images in self._images.items() if images.pop(content_hash, None) and not images]:
            del self._images[owner]

    def encoded(self, content_hash: bytes) -> None:
        """As `tried`, and not to be encoded ahead again."""
        self.tried(content_hash)
        self._encoded[content_hash] = None
        self._encoded.move_to_end(content_hash)
        if len(self._encoded) > MAX_REMEMBERED:
            self._encoded.popitem(last=False)
