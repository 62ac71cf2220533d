"""Who computes what in the next step: admission, chunks of prefill, preemption, and what the sampled tokens mean for each request.

Plain bookkeeping without tensors; a step of 16 rows costs microseconds. Knows nothing of text, of HTTP or of how pictures are encoded:
it says which pictures it waits for and is told when their embeddings are there.

Order of arrival decides everything: who is admitted first, who gets the prefill budget first, and who is preempted last. So the oldest
request always gets on, and everyone becomes the oldest.
"""

from bisect import insort
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from engine.config import EngineConfig
from engine.kv_cache import BlockManager
from engine.request import (
    Chunk,
    EngineStats,
    FinishReason,
    ImageInput,
    ImageSpan,
    InvalidRequestError,
    Plan,
    QueueFullError,
    Request,
    RequestStatus,
    SampledToken,
    StepOutput,
)
from engine.row import Row, validate

MAX_IMAGES_AHEAD = 16  # pictures that `images_needed` names at once


@dataclass(slots=True)
class _Search:
    """How many rows a beam search has and may have. Those that it may yet fork are kept free from its first step on."""

    num_beams: int
    num_rows: int = 1
    has_started: bool = False


class Scheduler:
    """Turns requests into steps. Between `schedule` and the `commit` of its plan only `abort`, `fail`, `add` and image news may come."""

    def __init__(self, config: EngineConfig, *, num_blocks: int, eos_token_ids: Collection[int]) -> None:
        assert config.session_len is not None, "the config is not resolved"
        assert num_blocks * config.cache_block_seq_len >= config.session_len, f"{num_blocks} blocks do not hold one request"
        self.config = config
        self.session_len = config.session_len
        self.blocks = BlockManager(num_blocks, config.cache_block_seq_len, enable_prefix_caching=config.enable_prefix_caching)
        self.requests: dict[str, Request] = {}
        self.num_preemptions = 0
        self.num_prompt_tokens = 0  # of requests when first admitted
        self.num_cached_prompt_tokens = 0
        self.num_output_tokens = 0
        self._eos_token_ids = frozenset(eos_token_ids)
        self._rows: dict[str, Row] = {}
        self._waiting: list[Row] = []  # both in order of arrival
        self._running: list[Row] = []
        self._num_added = 0
        self._held: set[str] = set()
        self._searches: dict[str, _Search] = {}  # by the request they belong to
        self._ready_images: set[bytes] = set()
        self._pending: dict[bytes, Row] = {}  # hash of a full block that is still to be computed → the running row that will

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def stats(self) -> EngineStats:
        """The fields that the scheduler knows; the others are left at their defaults."""
        return EngineStats(
            num_waiting=len(self._waiting),
            num_running=len(self._running),
            num_blocks=self.blocks.num_blocks,
            num_free_blocks=self.blocks.num_free,
            num_cached_blocks=self.blocks.num_cached,
            num_referenced_blocks=self.blocks.num_referenced,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_prompt_tokens=self.num_cached_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            num_preemptions=self.num_preemptions,
        )

    # Coming and going

    def add(self, request: Request) -> None:
        """Let a request wait. Raises PromptTooLongError, InvalidRequestError or QueueFullError."""
        if request.request_id in self.requests:
            raise InvalidRequestError(f"request_id: {request.request_id!r} is in use, only a new one is allowed")
        validate(request, self.session_len)
        if len(self._waiting) >= self.config.max_waiting:
            raise QueueFullError(f"{len(self._waiting)} requests wait already, at most {self.config.max_waiting} may; try again later")
        row = Row(request, self._num_added)
        request.block_ids = row.table.block_ids
        self._num_added += 1
        self.requests[request.request_id] = request
        self._rows[request.request_id] = row
        self._waiting.append(row)

    def abort(self, request_id: str) -> StepOutput | None:
        """End a request because its client left; its blocks are given back at once. None: unknown or finished."""
        return self._end(request_id, FinishReason.ABORT)

    def fail(self, request_id: str, error: str) -> StepOutput | None:
        """End one request with an error. None: unknown or finished."""
        return self._end(request_id, FinishReason.ERROR, error=error)

    def hold(self, request_id: str) -> None:
        """Do not admit a waiting request until its `release`."""
        self._held.add(request_id)

    def release(self, request_id: str) -> None:
        self._held.discard(request_id)

    # Beams: rows of one request that begin as copies of each other

    def reserve(self, request_id: str, num_beams: int) -> None:
        """Let a waiting request become as many rows."""
        self._searches[request_id] = _Search(num_beams)

    def unreserve(self, request_id: str) -> None:
        del self._searches[request_id]

    def fork(self, request_id: str, parent_id: str, child_id: str) -> None:
        """Another row like `parent_id`, which is wholly computed, on the same blocks."""
        parent = self._rows[parent_id]
        source = parent.request
        assert source.num_computed == len(source.token_ids), f"fork of {parent}"
        request = Request(
            child_id,
            source.prompt,
            source.params,
            status=RequestStatus.RUNNING,
            token_ids=list(source.token_ids),
            cache_keys=list(source.cache_keys),
            num_computed=source.num_computed,
            num_cached=source.num_cached,
            num_preemptions=source.num_preemptions,
            output_counts=dict(source.output_counts),
        )
        row = Row(request, parent.order)
        request.block_ids = row.table.block_ids
        self.blocks.fork(parent.table, row.table, request.num_computed)
        self.requests[child_id], self._rows[child_id] = request, row
        insort(self._running, row, key=_order)
        self._searches[request_id].num_rows += 1

    def append(self, request_id: str, token_id: int) -> None:
        """Let a wholly computed row go on with a token that was chosen elsewhere."""
        self._append_token(self.requests[request_id], token_id)

    def drop(self, request_id: str, beam_id: str) -> None:
        """End one row of a search without a word."""
        self._remove(self._rows[beam_id], FinishReason.ABORT)
        self._searches[request_id].num_rows -= 1

    # Pictures

    def images_needed(self) -> list[ImageInput]:
        """Pictures without an embedding, in the order in which rows will need them, each content hash once.

        At most MAX_IMAGES_AHEAD, of running rows and of the first `max_batch_size` waiting ones; also those that are being encoded.
        """
        needed: dict[bytes, ImageInput] = {}
        for row in (*self._running, *self._waiting[: self.config.max_batch_size]):
            for image in self._missing_images(row):
                needed.setdefault(image.content_hash, image)
                if len(needed) == MAX_IMAGES_AHEAD:
                    return list(needed.values())
        return list(needed.values())

    def image_ready(self, content_hash: bytes) -> None:
        self._ready_images.add(content_hash)

    def image_forgotten(self, content_hash: bytes) -> None:
        """The embedding is gone; the picture is needed again where a row has not computed it."""
        self._ready_images.discard(content_hash)

    def pinned_images(self) -> set[bytes]:
        """Ready pictures that a running row has not wholly computed: these must not be forgotten."""
        return {
            content_hash
            for row in self._running
            for span in row.spans_from(row.request.num_computed)
            if (content_hash := row.request.prompt.images[span.image].content_hash) in self._ready_images
        }

    def requests_with_image(self, content_hash: bytes) -> list[str]:
        """Live requests that have not computed all of this picture; to fail where it cannot be encoded."""
        return [
            row.request.request_id
            for row in self._rows.values()
            if any(row.request.prompt.images[span.image].content_hash == content_hash for span in row.spans_from(row.request.num_computed))
        ]

    # One step

    def schedule(self) -> Plan:
        """The next step: a slot for every row that decodes, then prefill within the budget. Empty e.g. while pictures are encoded."""
        chunks, copies = self._schedule_decodes()
        num_left = self.config.max_prefill_token_num
        for row in self._running:
            if not row.is_decoding and (end := self._chunk_end(row, row.request.num_computed, num_left)) > row.request.num_computed:
                chunks.append(self._chunk(row, end))
                num_left -= len(chunks[-1].token_ids)
        chunks += self._admit(num_left)
        return Plan(tuple(chunks), tuple(copies))

    def commit(self, plan: Plan, sampled: Mapping[str, SampledToken]) -> list[StepOutput]:
        """Advance the plan's requests, publish their full blocks, append the sampled tokens and end what is finished.

        `sampled` has a token for every chunk that samples, but for beams, which wait for theirs. Requests that ended since `schedule` are
        skipped.
        """
        outputs = []
        for chunk in plan.chunks:
            row = self._rows.get(chunk.request_id)
            if row is None or row.request.status is not RequestStatus.RUNNING:
                continue
            self._advance(row, chunk)
            if chunk.request_id in sampled:
                outputs.append(self._append(row, sampled[chunk.request_id]))
            elif row.request.params.max_tokens == 0 and row.request.num_computed == len(row.request.token_ids):
                outputs.append(self._ended(row, FinishReason.LENGTH))
        return outputs

    def check(self) -> None:
        """Raises AssertionError, with the state, where requests, rows and blocks do not agree."""
        self.blocks.check()
        rows = [*self._running, *self._waiting]
        assert {row.request.request_id: row.request for row in rows} == self.requests, f"rows {rows} of requests {self.requests}"
        assert {row.request.request_id: row for row in rows} == self._rows, f"rows {rows} by id {self._rows}"
        assert len(self._running) <= self.config.max_batch_size, f"{len(self._running)} run"
        for part in (self._running, self._waiting):
            assert [row.order for row in part] == sorted(row.order for row in part), f"out of order: {part}"
        for row in self._waiting:
            assert row.request.status is RequestStatus.WAITING, f"waits: {row}"
            assert row.request.num_computed == len(row.table.block_ids) == 0, f"waits with blocks: {row}"
        for row in self._running:
            assert row.request.status is RequestStatus.RUNNING, f"runs: {row}"
            assert row.request.block_ids is row.table.block_ids, f"blocks of another: {row}"
            assert 0 <= row.request.num_computed <= len(row.request.token_ids) == len(row.request.cache_keys), f"lengths: {row}"
            assert row.request.num_computed < len(row.request.token_ids) or row.request.params.num_beams > 1, f"nothing to do: {row}"
            assert row.request.num_computed <= len(row.table.block_ids) * self.blocks.block_size, f"slots without blocks: {row}"
        assert all(row in self._running for row in self._pending.values()), f"pending blocks of {list(self._pending.values())}"
        if not self._running:
            assert self.blocks.num_referenced == 0, f"{self.blocks.num_referenced} blocks are referenced by no request"

    # Private: the parts of `schedule`, in the order in which they run

    def _schedule_decodes(self) -> tuple[list[Chunk], list[tuple[int, int]]]:
        """A slot for each decoding row, oldest first; the youngest rows are preempted where blocks are short."""
        chunks: list[Chunk] = []
        copies: list[tuple[int, int]] = []
        for row in list(self._running):
            if row.is_decoding:  # not if it was preempted for an older one
                new_copies = self._append_slot(row)
                if new_copies is not None:
                    copies += new_copies
                    chunks.append(self._chunk(row, len(row.request.token_ids)))
        return chunks, copies

    def _append_slot(self, row: Row) -> list[tuple[int, int]] | None:
        """Room for the row's newest token. None: the row itself was the youngest and had to go."""
        request = row.request
        while (copies := self.blocks.append(row.table, request.num_computed, len(request.token_ids))) is None:
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is row:
                return None
        return copies

    def _preempt(self, row: Row) -> None:
        """Back to waiting: without blocks, with its output. Its published blocks may still be there when its turn comes."""
        self._running.remove(row)
        self._release(row)
        search = self._searches.get(row.request.request_id)
        if search is not None and search.num_rows == 1:
            search.has_started = False
        row.request.status = RequestStatus.WAITING
        row.request.num_computed = 0
        row.request.num_preemptions += 1
        self.num_preemptions += 1
        insort(self._waiting, row, key=_order)

    def _admit(self, num_left: int) -> list[Chunk]:
        """First chunks of waiting rows, in order of arrival, until slots, rows or blocks run out.

        A row is passed over only while it is held, or waits for a picture or for a block that a running row is computing.
        """
        chunks: list[Chunk] = []
        for row in self._waiting[: self.config.max_batch_size]:
            if num_left <= 0 or not self._has_rows_for(row):
                break
            if row.request.request_id in self._held:
                continue
            num_matched = self._match(row)
            if not row.request.params.reads_prompt and self.blocks.next_digest(row.table, num_matched) in self._pending:
                continue
            num_matched = self._without_cut_spans(row, num_matched)
            start = num_matched * self.blocks.block_size
            if self._waits_for_image(row, start):
                continue
            end = self._chunk_end(row, start, num_left)
            if end == start or not self._start(row, num_matched):
                break
            chunks.append(self._chunk(row, end))
            num_left -= end - start
        return chunks

    def _has_rows_for(self, row: Row) -> bool:
        """Whether a waiting row may run beside the others, those counted that beam searches will fork."""
        num_reserved = sum(search.num_beams - search.num_rows for search in self._searches.values() if search.has_started)
        search = self._searches.get(row.request.request_id)
        num_wanted = 1 if search is None or search.has_started else 1 + search.num_beams - search.num_rows
        return len(self._running) + num_reserved + num_wanted <= self.config.max_batch_size

    def _match(self, row: Row) -> int:
        """Leading blocks that need not be computed: none where the request reads all of its prompt."""
        return 0 if row.request.params.reads_prompt else self.blocks.match(row.table)

    def _without_cut_spans(self, row: Row, num_matched: int) -> int:
        """The largest number of matched blocks that does not end inside an atomic span."""
        size = self.blocks.block_size
        while (span := next(row.spans_from(num_matched * size), None)) and span.is_atomic and span.start < num_matched * size:
            num_matched = span.start // size
        return num_matched

    def _waits_for_image(self, row: Row, slot: int) -> bool:
        span = next(row.spans_from(slot), None)
        return span is not None and span.start <= slot and not self._is_ready(row, span)

    def _start(self, row: Row, num_matched: int) -> bool:
        """Give a waiting row blocks for all its slots, and let it run. False where blocks are short.

        One block per running row is left over, since each will soon need its next one: fewer preemptions.
        """
        request = row.request
        if not self.blocks.allocate(row.table, len(request.token_ids), num_matched=num_matched, num_spare=len(self._running)):
            return False
        for digest in self.blocks.digests(row.table, num_matched):
            self._pending.setdefault(digest, row)
        if search := self._searches.get(request.request_id):
            search.has_started = True
        request.num_computed = num_matched * self.blocks.block_size
        request.status = RequestStatus.RUNNING
        if request.num_preemptions == 0 and not request.prompt.is_probe:
            request.num_cached = request.num_computed
            self.num_prompt_tokens += request.num_prompt_tokens
            self.num_cached_prompt_tokens += request.num_cached
        self._waiting.remove(row)
        insort(self._running, row, key=_order)
        return True

    def _chunk_end(self, row: Row, start: int, num_left: int) -> int:
        """Where a chunk of prefill from `start` ends: at the budget, before a picture that is not ready, never inside an atomic span.

        An atomic span that is larger than the whole budget is taken when none of the budget is spent.
        """
        if num_left <= 0:
            return start
        end = min(len(row.request.token_ids), start + num_left)
        for span in row.spans_from(start):
            if span.start >= end:
                break
            span_end = span.start + span.num_tokens
            if not self._is_ready(row, span):
                return max(start, span.start)
            if span.is_atomic and span_end > end:
                is_first = span.start == start and num_left >= self.config.max_prefill_token_num
                return span_end if is_first else span.start
        return end

    def _chunk(self, row: Row, end: int) -> Chunk:
        request, start, params = row.request, row.request.num_computed, row.request.params
        reads = request.num_output_tokens == 0  # a preempted request has read its prompt before
        return Chunk(
            request.request_id,
            request.token_ids[start:end],
            start,
            row.table.block_ids[: self.blocks.num_blocks_for(end)],
            row.positions(start, end),
            row.image_pieces(start, end),
            end == len(request.token_ids) and params.max_tokens != 0,
            params.pools and reads,
            None if params.prompt_logprobs is None or not reads else request.prompt.token_ids[start + 1 : end + 1],
            params.prompt_logprobs or 0,
        )

    # Private: the parts of `commit`

    def _advance(self, row: Row, chunk: Chunk) -> None:
        request = row.request
        assert chunk.start == request.num_computed, f"{request.request_id} has {request.num_computed} slots, not {chunk.start}"
        request.num_computed += len(chunk.token_ids)
        for digest in self.blocks.commit(row.table, request.num_computed):
            if self._pending.get(digest) is row:
                del self._pending[digest]

    def _append(self, row: Row, sampled: SampledToken) -> StepOutput:
        request, token_id = row.request, sampled.token_id
        self._append_token(request, token_id)
        reason = self._finish_reason(request, token_id)
        if reason is not None:
            self._remove(row, reason)
        return StepOutput(
            request_id=request.request_id,
            token_ids=[token_id],
            logprobs=None if sampled.logprobs is None else [sampled.logprobs],
            finish_reason=reason,
            num_cached_tokens=request.num_cached,
        )

    def _append_token(self, request: Request, token_id: int) -> None:
        request.token_ids.append(token_id)
        request.cache_keys.append(token_id)
        request.output_counts[token_id] = request.output_counts.get(token_id, 0) + 1
        self.num_output_tokens += not request.prompt.is_probe

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        params = request.params
        if token_id in params.stop_token_ids or (token_id in self._eos_token_ids and not params.ignore_eos):
            return FinishReason.STOP
        if len(request.token_ids) >= self.session_len or request.num_output_tokens == params.max_tokens:
            return FinishReason.LENGTH
        return None

    # Private: shared

    def _end(self, request_id: str, reason: FinishReason, *, error: str | None = None) -> StepOutput | None:
        row = self._rows.get(request_id)
        return None if row is None else self._ended(row, reason, error=error)

    def _ended(self, row: Row, reason: FinishReason, *, error: str | None = None) -> StepOutput:
        self._remove(row, reason)
        request = row.request
        return StepOutput(request_id=request.request_id, finish_reason=reason, error=error, num_cached_tokens=request.num_cached)

    def _remove(self, row: Row, reason: FinishReason) -> None:
        (self._running if row.request.status is RequestStatus.RUNNING else self._waiting).remove(row)
        self._release(row)
        row.request.status = RequestStatus.FINISHED
        row.request.finish_reason = reason
        self._held.discard(row.request.request_id)
        del self.requests[row.request.request_id]
        del self._rows[row.request.request_id]

    def _release(self, row: Row) -> None:
        for digest in self.blocks.digests(row.table, row.table.num_published) if row.table.block_ids else ():
            if self._pending.get(digest) is row:
                del self._pending[digest]
        self.blocks.free(row.table)

    def _is_ready(self, row: Row, span: ImageSpan) -> bool:
        return row.request.prompt.images[span.image].content_hash in self._ready_images

    def _missing_images(self, row: Row) -> Iterator[ImageInput]:
        """Pictures that the row has yet to compute and that are not ready, in order. Those in the prefix cache are not needed."""
        images = row.request.prompt.images
        missing = [span for span in row.spans_from(row.request.num_computed) if not self._is_ready(row, span)]
        if missing and row.request.status is RequestStatus.WAITING:
            num_cached = self._without_cut_spans(row, self._match(row)) * self.blocks.block_size
            missing = [span for span in missing if span.start + span.num_tokens > num_cached]
        for span in missing:
            yield images[span.image]


def _order(row: Row) -> int:
    return row.order
