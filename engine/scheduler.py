"""Who computes what in the next step: admission, chunks of prefill, preemption, and what the sampled tokens mean for each request.

Plain bookkeeping without tensors; a step of 16 rows costs microseconds. Knows nothing of text, of HTTP or of how pictures are encoded:
it says which pictures it waits for and is told when their embeddings are there.

Order decides who is admitted first and, among a tenant's rows, who is preempted last: that of arrival, in which tenants take turns. So the
oldest request always gets on, and everyone becomes the oldest. What is short, the prefill budget and the encoder, is shared as
`engine.turns` says; what running rows hold, rows and blocks, as `engine.shares` says. A beam search is preempted as a whole and waits as
one row (`engine.searches`): of one that runs some row can always be computed, so that it never just holds blocks that others need.
"""

from bisect import insort
from collections.abc import Collection, Iterator, Mapping
from itertools import islice

from engine.config import EngineConfig
from engine.kv_cache import BlockManager
from engine.pictures import Pictures
from engine.request import (
    Chunk,
    EngineStats,
    FinishReason,
    ImageInput,
    InvalidRequestError,
    Plan,
    QueueFullError,
    Request,
    RequestStatus,
    SampledToken,
    StepOutput,
)
from engine.row import Row, validate
from engine.searches import Searches, num_common
from engine.shares import Shares, Want, youngest_of_most_blocks
from engine.turns import TenantTurns

NUM_ADMISSIBLE = 4  # waiting rows that a step looks at, for each that may run


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
        self.num_output_tokens = 0  # of answers: a beam search's is counted when it has ended
        self._eos_token_ids = frozenset(eos_token_ids)
        self._rows: dict[str, Row] = {}
        self._waiting: list[Row] = []  # both in order
        self._running: list[Row] = []
        self._num_added = 0
        self._tenant_turns = TenantTurns()
        self._prefill_budget = config.max_prefill_token_num  # of this step
        self._smallest_prefill_next = False
        self._short: Row | None = None  # lacked blocks or rows when it was its turn: nobody comes in before it
        self._held: set[str] = set()
        self._searches = Searches()
        self._shares = Shares(config.max_batch_size, self.blocks, self._running, self._searches)
        self._pictures = Pictures(self.blocks)
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
        if request.request_id in self.requests or request.request_id in self._searches:
            raise InvalidRequestError(f"request_id: {request.request_id!r} is in use, only a new one is allowed")
        validate(request, self.session_len)
        if len(self._waiting) >= self.config.max_waiting and not self._is_first_of_its_tenant(request):
            raise QueueFullError(f"{len(self._waiting)} requests wait already, at most {self.config.max_waiting} may; try again later")
        tenant = request.prompt.tenant
        row = Row(request, (self._tenant_turns.place(tenant, self._places_of(tenant)), self._num_added))
        request.block_ids = row.table.block_ids
        self._num_added += 1
        self.requests[request.request_id] = request
        self._rows[request.request_id] = row
        insort(self._waiting, row, key=_order)

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
        self._searches.begin(self._rows[request_id], num_beams)

    def unreserve(self, request_id: str) -> None:
        self._searches.end(request_id)

    def fork(self, request_id: str, parent_id: str, child_id: str) -> None:
        """Another row like `parent_id`, which is wholly computed, on the same blocks."""
        parent = self._rows[parent_id]
        source = parent.request
        assert parent.is_computed, f"fork of {parent}"
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
            distinct_prompt_ids=source.distinct_prompt_ids,
        )
        row = Row(request, parent.order)
        request.block_ids = row.table.block_ids
        self.blocks.fork(parent.table, row.table, request.num_computed)
        self.requests[child_id], self._rows[child_id] = request, row
        insort(self._running, row, key=_order)
        self._searches.add_row(request_id, row)

    def is_computed(self, request_id: str) -> bool:
        """Whether a row has nothing left to compute."""
        return self._rows[request_id].is_computed

    def append(self, request_id: str, token_id: int) -> None:
        """Let a wholly computed row go on with a token that was chosen elsewhere."""
        self._append_token(self.requests[request_id], token_id)

    def drop(self, beam_id: str) -> None:
        """End one row of a search without a word."""
        self._remove(self._rows[beam_id], FinishReason.ABORT)

    # Pictures

    def images_needed(self, *, ahead: bool = True) -> list[ImageInput]:
        """Pictures without an embedding, in the order in which they are to be encoded; also those that are being encoded.

        A bounded number, of running rows and of the first `max_batch_size` waiting ones, then of as many that are held. ahead: False where
        memory is short: of these waiting rows only each tenant's first one with pictures, so that everyone gets on.
        """
        waiting = self._next_waiting()
        return self._pictures.needed((*self._running, *(waiting if ahead else self._pictures.first_of_each_tenant(waiting))))

    def encoding_begun(self) -> None:
        """The first of `images_needed` is on its way."""
        self._pictures.encoding_begun()

    def image_ready(self, content_hash: bytes) -> None:
        self._pictures.add(content_hash)
        for row in self._waiting:
            row.lacks_images = row.lacks_images and self._pictures.lacking_span(row, 0) is not None
            if content_hash in row.content_hashes:  # not only the awaited one: cached blocks before it may be gone
                row.awaits = None

    def image_forgotten(self, content_hash: bytes) -> None:
        """The embedding is gone; the picture is needed again where a row has not computed it."""
        self._pictures.discard(content_hash)

    def pinned_images(self) -> set[bytes]:
        """Ready pictures that a running row, or a waiting one that `images_needed` looks at, has yet to compute: not to be forgotten."""
        return self._pictures.pinned((*self._running, *self._next_waiting()))

    def requests_with_image(self, content_hash: bytes) -> list[str]:
        """Live requests that have not computed all of this picture; to fail where it cannot be encoded."""
        return [
            row.request.request_id
            for row in self._rows.values()
            if any(row.content_hash(span) == content_hash for span in row.spans_from(row.request.num_computed))
        ]

    # One step

    def prefill_load(self) -> tuple[int, int]:
        """How many rows decode, and how many more could be computing their prompts: those that do not wait for a picture."""
        num_decoding = sum(row.is_decoding for row in self._running)
        num_prefilling = sum(not row.is_decoding and not self._pictures.is_awaited_by(row) for row in self._running)
        is_free = (row for row in self._waiting if not (row.awaits or row.lacks_images or row.request.request_id in self._held))
        return num_decoding, num_prefilling + sum(1 for _ in is_free)

    def schedule(self, *, max_prefill_tokens: int | None = None) -> Plan:
        """The next step: a slot for every row that decodes, then prefill within the budget. Empty e.g. while pictures are encoded.

        max_prefill_tokens: at least 1; None: the config's.
        """
        self._prefill_budget = max_prefill_tokens or self.config.max_prefill_token_num
        self._shares.begin(self._first_wants(), self._preempt)
        chunks, copies = self._schedule_decodes()
        plan = Plan((*chunks, *self._schedule_prefill()), tuple(copies))
        self._shares.end()
        return plan

    def commit(self, plan: Plan, sampled: Mapping[str, SampledToken]) -> list[StepOutput]:
        """Advance the plan's requests, publish their full blocks, append the sampled tokens and end what is finished.

        `sampled` has a token for every chunk that samples, but for beams, which wait for theirs. Requests that ended since `schedule` are
        skipped.
        """
        outputs = []
        reached: set[bytes] = set()  # pictures, any of whose blocks may be in the prefix cache now
        for chunk in plan.chunks:
            row = self._rows.get(chunk.request_id)
            if row is None or row.request.status is not RequestStatus.RUNNING:
                continue
            if self._advance(row, chunk):
                reached |= row.content_hashes
            if chunk.request_id in sampled:
                outputs.append(self._append(row, sampled[chunk.request_id]))
            elif row.request.params.max_tokens == 0 and row.request.num_computed == len(row.request.token_ids):
                outputs.append(self._ended(row, FinishReason.LENGTH))
        for row in self._waiting if reached else ():
            if row.awaits in reached:
                row.awaits = None
        return outputs

    def check(self) -> None:
        """Raises AssertionError, with the state, where requests, rows and blocks do not agree."""
        self.blocks.check()
        set_aside = self._searches.set_aside()
        rows = [*self._running, *self._waiting, *set_aside]
        assert len(rows) == len(self.requests), f"a row is in two places: {rows}"
        assert {row.request.request_id: row.request for row in rows} == self.requests, f"rows {rows} of requests {self.requests}"
        assert {row.request.request_id: row for row in rows} == self._rows, f"rows {rows} by id {self._rows}"
        assert len(self._running) <= self.config.max_batch_size, f"{len(self._running)} run"
        for part in (self._running, self._waiting):
            assert [row.order for row in part] == sorted(row.order for row in part), f"out of order: {part}"
        for row in (*self._waiting, *set_aside):
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

    def _first_wants(self) -> Collection[Want]:
        """Of the first row of each tenant that could start. None where no tenant's rows run."""
        if not self._waiting or not any(row.tenant for row in self._running):
            return []
        wants: dict[str, Want] = {}
        for row in islice(self._admissible(), NUM_ADMISSIBLE * self.config.max_batch_size):
            if row.tenant not in wants and (num_matched := self._num_matched_at_start(row)) is not None:
                wants[row.tenant] = self._shares.want(row, num_matched)
        return wants.values()

    def _schedule_decodes(self) -> tuple[list[Chunk], list[tuple[int, int]]]:
        """A slot for each decoding row, oldest first; where blocks are short, rows are preempted, maybe some that have theirs already."""
        given: list[tuple[Row, list[tuple[int, int]]]] = []
        for row in list(self._running):
            if row.request.status is RequestStatus.RUNNING and (row.is_decoding or (row.is_beam and not row.is_computed)):
                copies = self._append_slots(row)
                if copies is not None:
                    given.append((row, copies))
        given = [(row, copies) for row, copies in given if row.request.status is RequestStatus.RUNNING]
        chunks = [self._chunk(row, len(row.request.token_ids)) for row, _ in given if row.is_decoding]
        return chunks, [pair for _, copies in given for pair in copies]

    def _append_slots(self, row: Row) -> list[tuple[int, int]] | None:
        """Room for the row's newest token, or for all that a beam which was set aside has to compute. None: the row itself had to go."""
        request = row.request
        while (copies := self.blocks.append(row.table, request.num_computed, len(request.token_ids))) is None:
            self._preempt(youngest_of_most_blocks(self._running))
            if request.status is RequestStatus.WAITING:
                return None
        return copies

    def _preempt(self, row: Row) -> None:
        """Back to waiting: without blocks, with its output. Its published blocks may still be there when its turn comes.

        All rows of a search go, and the first of them waits for all.
        """
        rows = self._searches.rows_with(row)
        for each in rows:
            if each.request.status is RequestStatus.RUNNING:
                self._running.remove(each)
                self._release(each)
                each.request.status = RequestStatus.WAITING
                each.request.num_computed = 0
                each.request.num_preemptions += 1
        self._shares.rows_changed()
        self.num_preemptions += 1
        insort(self._waiting, rows[0], key=_order)

    def _schedule_prefill(self) -> list[Chunk]:
        """Chunks of prompts within the budget. While it does not suffice, every other step serves those first that need least."""
        chunks: list[Chunk] = []
        num_left, is_admitting = self._prefill_budget, True
        for row in self._prefill_order():
            if num_left <= 0:
                break
            if row.request.status is RequestStatus.WAITING:
                is_admitting = is_admitting and self._admit(row, num_left)
            if row.request.status is RequestStatus.RUNNING:
                start = row.request.num_computed
                if (end := self._chunk_end(row, start, num_left)) > start:
                    chunks.append(self._chunk(row, end))
                    num_left -= end - start
        self._smallest_prefill_next = num_left <= 0 and not self._smallest_prefill_next
        return chunks

    def _prefill_order(self) -> list[Row]:
        """Rows with a prompt to compute, running ones and those that may be admitted, in the order in which this step serves them."""
        rows = [row for row in self._running if not row.is_decoding]
        rows = sorted([*rows, *islice(self._admissible(), NUM_ADMISSIBLE * self.config.max_batch_size)], key=_order)
        if self._short is not None and not self._is_short(self._short):
            self._short = None
        if self._smallest_prefill_next and self._short is None:
            rows.sort(key=self._num_to_compute)
        return rows

    def _is_short(self, row: Row) -> bool:
        """Whether a row that lacked blocks or rows may lack them still: nothing else keeps it waiting."""
        is_free = row.request.status is RequestStatus.WAITING and row.awaits is None and not row.lacks_images
        return is_free and not self._shares.gives_way(row)

    def _admissible(self) -> Iterator[Row]:
        """Waiting rows but for those of which it is known that they cannot run."""
        num_places = self._num_places_for_lacking()
        for row in self._waiting:
            if row.awaits is not None or row.request.request_id in self._held or (row.lacks_images and num_places <= 0):
                continue
            num_places -= row.lacks_images
            yield row

    def _num_to_compute(self, row: Row) -> int:
        is_waiting = row.request.status is RequestStatus.WAITING
        num_computed = row.num_matched(self.blocks) * self.blocks.block_size if is_waiting else row.request.num_computed
        return len(row.request.token_ids) - num_computed

    def _admit(self, row: Row, num_left: int) -> bool:
        """Let a waiting row run where nothing keeps it waiting. False where no row behind it may pass: rows, blocks or budget are short.

        It is passed over while it gives way to another tenant, and while `_num_matched_at_start` says so.
        """
        if self._shares.gives_way(row):
            return True
        if self._searches.num_wanted(row) > self._shares.num_free_rows:
            self._short = row
            return False
        num_matched = self._num_matched_at_start(row)
        if num_matched is None:
            return True
        start = num_matched * self.blocks.block_size
        if self._chunk_end(row, start, num_left) == start:
            return False
        if not self._start(row, num_matched):
            self._short = row
            return False
        return True

    def _num_matched_at_start(self, row: Row) -> int | None:
        """How many leading blocks a waiting row need not compute. None: it cannot start.

        It waits for a picture, for a block that a running row is computing, or for one of those running rows, at most half of all, that
        lack pictures: the others are for rows that can be computed.
        """
        num_matched = row.num_matched(self.blocks)
        if not row.request.params.reads_prompt and self.blocks.next_digest(row.table, num_matched) in self._pending:
            return None
        num_matched = row.without_cut_spans(num_matched, self.blocks.block_size)
        start = num_matched * self.blocks.block_size
        if (span := self._pictures.lacking_span(row, start)) is not None:
            row.awaits = row.content_hash(span) if span.start <= start else None
            row.lacks_images = self._num_places_for_lacking() <= 0
            if row.awaits is not None or row.lacks_images:
                return None
        return num_matched

    def _num_places_for_lacking(self) -> int:
        """How many more rows may run that lack pictures."""
        num_lacking = sum(self._pictures.lacking_span(row, row.request.num_computed) is not None for row in self._running)
        return max(1, self.config.max_batch_size // 2) - num_lacking

    def _start(self, row: Row, num_matched: int) -> bool:
        """Give a waiting row blocks for all its slots, and let it run. False where blocks are short.

        One block per running row is left over, since each will soon need its next one: fewer preemptions. So is what the rows behind the
        first one of a search will take.
        """
        request = row.request
        num_spare = len(self._running) + self._searches.num_blocks_behind(row, self.blocks.block_size)
        if not self.blocks.allocate(row.table, len(request.token_ids), num_matched=num_matched, num_spare=num_spare):
            return False
        for digest in self.blocks.digests(row.table, num_matched):
            self._pending.setdefault(digest, row)
        request.num_computed = num_matched * self.blocks.block_size
        request.status = RequestStatus.RUNNING
        if request.num_preemptions == 0 and not request.prompt.is_probe:
            request.num_cached = request.num_computed
            self.num_prompt_tokens += request.num_prompt_tokens
            self.num_cached_prompt_tokens += request.num_cached
        self._shares.rows_changed()
        self._tenant_turns.begun(row.tenant, row.order[0], self._cost(row))
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
            if not self._pictures.is_ready(row, span):
                return max(start, span.start)
            if span.is_atomic and span_end > end:
                is_first = span.start == start and num_left >= self._prefill_budget
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

    def _advance(self, row: Row, chunk: Chunk) -> bool:
        """Whether blocks were published."""
        request = row.request
        assert chunk.start == request.num_computed, f"{request.request_id} has {request.num_computed} slots, not {chunk.start}"
        request.num_computed += len(chunk.token_ids)
        published = self.blocks.commit(row.table, request.num_computed)
        for digest in published:
            if self._pending.get(digest) is row:
                del self._pending[digest]
        if row.is_computed:
            for other in self._searches.behind(row):
                self._resume(other, row)
        return bool(published)

    def _resume(self, row: Row, first: Row) -> None:
        """Let a beam that was set aside go on, on the blocks of its search's first row as far as they are the same."""
        request = row.request
        request.num_computed = num_common(first, row)
        self.blocks.fork(first.table, row.table, request.num_computed)
        request.status = RequestStatus.RUNNING
        self._shares.rows_changed()
        insort(self._running, row, key=_order)

    def _append(self, row: Row, sampled: SampledToken) -> StepOutput:
        request, token_id = row.request, sampled.token_id
        self._append_token(request, token_id)
        self.num_output_tokens += not request.prompt.is_probe
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

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        params = request.params
        if token_id in params.stop_token_ids or (token_id in self._eos_token_ids and not params.ignore_eos):
            return FinishReason.STOP
        if len(request.token_ids) >= self.session_len or request.num_output_tokens == params.max_tokens:
            return FinishReason.LENGTH
        return None

    # Private: shared

    def _is_first_of_its_tenant(self, request: Request) -> bool:
        """Whether a named tenant has nothing waiting: then it comes into a full room too, or another tenant could lock it out."""
        tenant = request.prompt.tenant
        return bool(tenant) and all(row.request.prompt.tenant != tenant for row in self._waiting)

    def _places_of(self, tenant: str) -> Iterator[tuple[int, int]]:
        """Place and cost of the tenant's waiting rows."""
        return ((row.order[0], self._cost(row)) for row in self._waiting if row.tenant == tenant)

    def _cost(self, row: Row) -> int:
        """The number of steps that a prompt takes of the prefill."""
        return -(-row.request.num_prompt_tokens // self.config.max_prefill_token_num)

    def _end(self, request_id: str, reason: FinishReason, *, error: str | None = None) -> StepOutput | None:
        row = self._rows.get(request_id)
        return None if row is None else self._ended(row, reason, error=error)

    def _ended(self, row: Row, reason: FinishReason, *, error: str | None = None) -> StepOutput:
        self._remove(row, reason)
        request = row.request
        return StepOutput(request_id=request.request_id, finish_reason=reason, error=error, num_cached_tokens=request.num_cached)

    def _remove(self, row: Row, reason: FinishReason) -> None:
        if row.request.status is RequestStatus.RUNNING:
            self._running.remove(row)
        elif row in self._waiting:  # else it was set aside
            self._waiting.remove(row)
        if row is self._short:
            self._short = None
        self._searches.remove_row(row)
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

    def _next_waiting(self) -> list[Row]:
        """Those for which pictures are encoded, held ones last."""
        free = islice((row for row in self._waiting if row.request.request_id not in self._held), self.config.max_batch_size)
        held = sorted((self._rows[request_id] for request_id in self._held), key=_order)
        return [*free, *held[: self.config.max_batch_size]]


def _order(row: Row) -> tuple[int, int]:
    return row.order
