"""A live request as the scheduler sees it: its place in the order of arrival, its blocks, and which pictures lie where in its slots.

Knows nothing of other requests, of budgets or of what is ready.
"""

from bisect import bisect_right
from collections.abc import Iterator

from engine.kv_cache import BlockManager, BlockTable
from engine.request import ImagePiece, ImageSpan, InvalidRequestError, PromptTooLongError, Request


class Row:
    """One request, from `Scheduler.add` to its end."""

    __slots__ = ("awaits", "content_hashes", "lacks_images", "order", "request", "search_id", "span_ends", "table")

    def __init__(self, request: Request, order: tuple[int, int]) -> None:
        self.request = request
        self.order = order  # its place among the tenants' turns, and the number of its arrival
        self.awaits: bytes | None = None  # while it waits: the picture without which it cannot begin, when it was last looked at
        self.lacks_images = False  # while it waits: it was passed over because enough rows lacked pictures
        self.search_id: str | None = None  # the request whose beam search it is a row of
        self.table = BlockTable(request.cache_keys, is_private=request.prompt.is_probe)
        self.content_hashes = frozenset(image.content_hash for image in request.prompt.images)
        self.span_ends = [span.start + span.num_tokens for span in request.prompt.spans]

    def __repr__(self) -> str:
        request = self.request
        slots = f"{request.num_computed} of {len(request.token_ids)} slots"
        return f"<{request.request_id} {request.status} {slots}, blocks {self.table.block_ids}>"

    @property
    def tenant(self) -> str:
        return self.request.prompt.tenant

    @property
    def is_beam(self) -> bool:
        return self.request.params.num_beams > 1

    @property
    def is_computed(self) -> bool:
        """Nothing is left to compute, as for a beam until all of its search are."""
        return self.request.num_computed == len(self.request.token_ids)

    @property
    def is_decoding(self) -> bool:
        """Only its newest output token is left to compute."""
        return self.request.num_computed == len(self.request.token_ids) - 1 >= self.request.num_prompt_tokens

    def spans_from(self, slot: int) -> Iterator[ImageSpan]:
        """The spans that end after `slot`, in order."""
        spans = self.request.prompt.spans
        for index in range(bisect_right(self.span_ends, slot), len(spans)):
            yield spans[index]

    def content_hash(self, span: ImageSpan) -> bytes:
        """Of the span's picture."""
        return self.request.prompt.images[span.image].content_hash

    def num_matched(self, blocks: BlockManager) -> int:
        """Leading blocks that need not be computed: none where the request reads all of its prompt."""
        return 0 if self.request.params.reads_prompt else blocks.match(self.table)

    def without_cut_spans(self, num_matched: int, block_size: int) -> int:
        """The largest number of matched blocks that does not end inside an atomic span."""
        while (span := next(self.spans_from(num_matched * block_size), None)) and span.is_atomic and span.start < num_matched * block_size:
            num_matched = span.start // block_size
        return num_matched

    def image_pieces(self, start: int, end: int) -> tuple[ImagePiece, ...]:
        """Where rows of embeddings go in a chunk of the slots `start … end`."""
        pieces = []
        for span in self.spans_from(start):
            if span.start >= end:
                break
            first, last = max(start, span.start), min(end, span.start + span.num_tokens)
            offset = span.offset + first - span.start
            pieces.append(ImagePiece(self.content_hash(span), first - start, offset, last - first, span.is_atomic))
        return tuple(pieces)

    def positions(self, start: int, end: int) -> tuple[list[int], ...] | None:
        """The prompt's own positions, and beyond it the slot plus the prompt's delta, on every axis. None: the prompt has none."""
        prompt, num_prompt = self.request.prompt, self.request.num_prompt_tokens
        if prompt.positions is None:
            return None
        beyond = range(max(start, num_prompt) + prompt.position_delta, end + prompt.position_delta)
        return tuple([*axis[start:end], *beyond] for axis in prompt.positions)


def validate(request: Request, session_len: int) -> None:
    """Raises PromptTooLongError, or InvalidRequestError for a prompt that contradicts itself."""
    prompt, num_tokens = request.prompt, request.num_prompt_tokens
    if num_tokens == 0:
        raise InvalidRequestError("prompt: it has no tokens, at least 1 is needed")
    if num_tokens + (request.params.max_tokens != 0) > session_len:
        raise PromptTooLongError(num_tokens, session_len)
    if len(prompt.cache_keys) != num_tokens:
        raise InvalidRequestError(f"prompt.cache_keys: {len(prompt.cache_keys)} keys, only one per token ({num_tokens}) is allowed")
    if prompt.positions is not None and any(len(axis) != num_tokens for axis in prompt.positions):
        raise InvalidRequestError(f"prompt.positions: only one per token ({num_tokens}) on every axis is allowed")
    slot = 0
    for span in prompt.spans:
        if span.start < slot or span.num_tokens < 1 or span.start + span.num_tokens > num_tokens:
            raise InvalidRequestError(f"prompt.spans: {span} is not allowed, only spans in order, disjoint, within {num_tokens} slots")
        if not 0 <= span.image < len(prompt.images):
            raise InvalidRequestError(f"prompt.spans: image {span.image} is not allowed, only below {len(prompt.images)}")
        if not 0 <= span.offset <= prompt.images[span.image].num_tokens - span.num_tokens:
            raise InvalidRequestError(f"prompt.spans: {span} takes rows that image {span.image} does not have")
        slot = span.start + span.num_tokens
