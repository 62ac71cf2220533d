"""Which pictures have their embeddings, which rows still lack some, and which one is encoded next.

A picture whose blocks a waiting row would take from the prefix cache is none that it lacks. Knows nothing of how pictures are encoded, of
budgets or of who may run: it is told what was encoded and what was forgotten, and is asked about rows.
"""

from collections.abc import Iterable, Iterator

from engine.kv_cache import BlockManager
from engine.request import ImageInput, ImageSpan, RequestStatus
from engine.row import Row
from engine.turns import by_turns

MAX_IMAGES_AHEAD = 16  # pictures that `needed` names at once


class Pictures:
    """The pictures of one scheduler's rows."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._ready: set[bytes] = set()
        self._smallest_next = False

    def add(self, content_hash: bytes) -> None:
        """The embedding is there."""
        self._ready.add(content_hash)

    def discard(self, content_hash: bytes) -> None:
        """The embedding is gone."""
        self._ready.discard(content_hash)

    def needed(self, rows: Iterable[Row]) -> list[ImageInput]:
        """Pictures without an embedding, each content hash once, at most MAX_IMAGES_AHEAD.

        By turns of the first row that lacks some, and of whoever lacks least.
        """
        missing = [images for row in rows if (images := {image.content_hash: image for image in self._missing(row)}.values())]
        pictures = [(sum(image.num_tokens for image in images), image) for images in missing for image in images]
        needed: dict[bytes, ImageInput] = {}
        for _, image in by_turns(pictures, lambda picture: picture[0], smallest_next=self._smallest_next):
            needed.setdefault(image.content_hash, image)
            if len(needed) == MAX_IMAGES_AHEAD:
                break
        return list(needed.values())

    def encoding_begun(self) -> None:
        """The first one of `needed` is on its way: the next turn is another's."""
        self._smallest_next = not self._smallest_next

    def pinned(self, rows: Iterable[Row]) -> set[bytes]:
        """Ready pictures that these rows have yet to compute."""
        return {
            content_hash
            for row in rows
            if not row.content_hashes.isdisjoint(self._ready)
            for span in self._spans_to_compute(row)
            if (content_hash := row.content_hash(span)) in self._ready
        }

    def first_of_each_tenant(self, rows: Iterable[Row]) -> list[Row]:
        """Each tenant's first row that has pictures to compute, ready or not."""
        firsts: dict[str, Row] = {}
        for row in rows:
            if row.tenant not in firsts and next(self._spans_to_compute(row), None) is not None:
                firsts[row.tenant] = row
        return list(firsts.values())

    def is_ready(self, row: Row, span: ImageSpan) -> bool:
        return row.content_hash(span) in self._ready

    def lacking_span(self, row: Row, slot: int) -> ImageSpan | None:
        """The first span that ends after the slot and whose picture is not ready."""
        return next((span for span in row.spans_from(slot) if not self.is_ready(row, span)), None)

    def is_awaited_by(self, row: Row) -> bool:
        """Whether a running row's next slot is one of a picture that is not ready."""
        span = self.lacking_span(row, row.request.num_computed)
        return span is not None and span.start <= row.request.num_computed

    def _missing(self, row: Row) -> Iterator[ImageInput]:
        """Pictures that the row has yet to compute and that are not ready, in order."""
        if self.lacking_span(row, row.request.num_computed) is None:
            return
        for span in self._spans_to_compute(row):
            if not self.is_ready(row, span):
                yield row.request.prompt.images[span.image]

    def _spans_to_compute(self, row: Row) -> Iterator[ImageSpan]:
        """Where the row has yet to compute pictures, in order."""
        slot = row.request.num_computed
        if row.request.prompt.spans and row.request.status is RequestStatus.WAITING:
            slot = row.without_cut_spans(row.num_matched(self._blocks), self._blocks.block_size) * self._blocks.block_size
        return row.spans_from(slot)
