"""A scheduler without an engine: requests written in a line, a step that samples what it is told, and a runner with a script, which
checks everything that a real one relies on. Knows nothing of tensors or of beam searches."""

import zlib
from collections.abc import Sequence
from typing import Any

from engine.config import EngineConfig
from engine.request import (
    Chunk,
    FinishReason,
    ImageInput,
    ImageSpan,
    Plan,
    Prompt,
    Request,
    SampledToken,
    SamplingParams,
    StepOutput,
    make_cache_keys,
)
from engine.scheduler import Scheduler

EOS = 0
IMAGE = 99  # placeholder token


def make_scheduler(num_blocks: int = 100, *, eos_token_ids: tuple[int, ...] = (EOS,), **settings: Any) -> Scheduler:
    defaults = {"session_len": 40, "max_batch_size": 4, "max_prefill_token_num": 8, "cache_block_seq_len": 4}
    config = EngineConfig(model_folder="", **(defaults | settings))
    return Scheduler(config, num_blocks=num_blocks, eos_token_ids=eos_token_ids)


def make_prompt(*parts: Sequence[int] | tuple[str, int] | tuple[str, int, bool], positions: bool = False, tenant: str = "") -> Prompt:
    """Parts are token ids, or (picture's name, number of its tokens, atomic)."""
    token_ids: list[int] = []
    images: list[ImageInput] = []
    spans: list[ImageSpan] = []
    for part in parts:
        if part and isinstance(part[0], str):
            name, num_tokens, *is_atomic = part
            spans.append(ImageSpan(len(token_ids), num_tokens, len(images), is_atomic=bool(is_atomic and is_atomic[0])))
            images.append(ImageInput(name.encode(), num_tokens, {}))
            token_ids += [IMAGE] * num_tokens
        else:
            token_ids += part
    keys = make_cache_keys(token_ids, images, spans)
    axes = tuple(tuple(10 * axis + slot for slot in range(len(token_ids))) for axis in range(3)) if positions else None
    delta = 100 if positions else 0
    return Prompt(
        token_ids=tuple(token_ids),
        cache_keys=keys,
        images=tuple(images),
        spans=tuple(spans),
        positions=axes,
        position_delta=delta,
        tenant=tenant,
    )


def make_request(request_id: str, *parts: Any, positions: bool = False, tenant: str = "", **params: Any) -> Request:
    return Request(request_id, make_prompt(*parts, positions=positions, tenant=tenant), SamplingParams(**params))


def add(scheduler: Scheduler, request_id: str, *parts: Any, **params: Any) -> Request:
    request = make_request(request_id, *parts, **params)
    scheduler.add(request)
    return request


def say(plan: Plan, token_id: int = 5) -> dict[str, SampledToken]:
    """The same token for every row that samples."""
    return {chunk.request_id: SampledToken(token_id) for chunk in plan.chunks if chunk.samples}


def step(scheduler: Scheduler, token_id: int = 5) -> tuple[Plan, list[StepOutput]]:
    plan = scheduler.schedule()
    scheduler.check()
    outputs = scheduler.commit(plan, say(plan, token_id))
    scheduler.check()
    return plan, outputs


def shape(plan: Plan) -> list[tuple[str, int, int, bool]]:
    return [(chunk.request_id, chunk.start, chunk.start + len(chunk.token_ids), chunk.samples) for chunk in plan.chunks]


def run_out(scheduler: Scheduler, *, max_steps: int = 1_000) -> list[StepOutput]:
    outputs: list[StepOutput] = []
    for _ in range(max_steps):
        if not scheduler.has_work:
            assert scheduler.blocks.num_referenced == 0
            return outputs
        for image in scheduler.images_needed():
            scheduler.image_ready(image.content_hash)
        outputs += step(scheduler)[1]
    raise AssertionError(f"still at work: {scheduler.requests}")


def deliver(outputs: list[StepOutput], answers: dict[str, list[int]], reasons: dict[str, FinishReason]) -> None:
    """Appends to each request's answer; nothing may come after its finish reason."""
    for output in outputs:
        assert output.request_id not in reasons, "an output after the last one"
        answers[output.request_id] += output.token_ids
        if output.finish_reason is not None:
            reasons[output.request_id] = output.finish_reason


def scripted_token(keys: Sequence[int]) -> int:
    """What the model says after these keys; an end token once in 29 times."""
    return zlib.crc32(repr(tuple(keys)).encode()) % 29


class ScriptedRunner:
    """Executes plans on a cache that holds, for each slot of each block, all keys up to it; checks what a real runner relies on."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.block_size = scheduler.config.cache_block_seq_len
        self.contents: dict[tuple[int, int], tuple[int, ...]] = {}
        self.embeddings: set[bytes] = set()

    def encoded(self, content_hash: bytes) -> None:
        self.embeddings.add(content_hash)
        self.scheduler.image_ready(content_hash)

    def forget(self, content_hash: bytes) -> None:
        self.embeddings.discard(content_hash)
        self.scheduler.image_forgotten(content_hash)

    def execute(self, plan: Plan) -> dict[str, SampledToken]:
        ids = [chunk.request_id for chunk in plan.chunks]
        assert len(set(ids)) == len(ids) <= self.scheduler.config.max_batch_size
        self.check_budget(plan)
        for source, target in plan.block_copies:
            for offset in range(self.block_size):
                self.contents[target, offset] = self.contents.get((source, offset), ())
        written = [place for chunk in plan.chunks for place in self.write(chunk)]
        assert len(set(written)) == len(written), "two rows write one slot"
        return {chunk.request_id: self.read(chunk) for chunk in plan.chunks if chunk.samples}

    def check_budget(self, plan: Plan) -> None:
        budget, prefills = self.scheduler.config.max_prefill_token_num, []
        for chunk in plan.chunks:
            request = self.scheduler.requests[chunk.request_id]
            if chunk.start < request.num_prompt_tokens or len(chunk.token_ids) > 1 or not chunk.samples:
                prefills.append(chunk)
        if sum(len(chunk.token_ids) for chunk in prefills) > budget:
            assert len(prefills) == 1, "more than one row where the budget is exceeded"
            spans = self.scheduler.requests[prefills[0].request_id].prompt.spans
            end = prefills[0].start + len(prefills[0].token_ids)
            assert any(span.is_atomic and (span.start, span.start + span.num_tokens) == (prefills[0].start, end) for span in spans)

    def write(self, chunk: Chunk) -> list[tuple[int, int]]:
        request = self.scheduler.requests[chunk.request_id]
        start, end = chunk.start, chunk.start + len(chunk.token_ids)
        assert start == request.num_computed
        assert end > start
        assert chunk.token_ids == request.token_ids[start:end]
        assert chunk.samples == (end == len(request.token_ids))
        assert len(chunk.block_ids) == -(-end // self.block_size)
        self.check_images(request, chunk)
        places = [(chunk.block_ids[slot // self.block_size], slot % self.block_size) for slot in range(start, end)]
        for slot, place in enumerate(places, start):
            self.contents[place] = tuple(request.cache_keys[: slot + 1])
        return places

    def check_images(self, request: Request, chunk: Chunk) -> None:
        """Every image slot of the chunk gets its own row of a ready embedding, and no other slot does."""
        start, end = chunk.start, chunk.start + len(chunk.token_ids)
        expected = {}
        for span in request.prompt.spans:
            inside = [slot for slot in range(span.start, span.start + span.num_tokens) if start <= slot < end]
            assert not (span.is_atomic and inside) or len(inside) == span.num_tokens, "an atomic span is split"
            content_hash = request.prompt.images[span.image].content_hash
            expected |= {slot - start: (content_hash, span.offset + slot - span.start) for slot in inside}
        given = {
            piece.row + row: (piece.content_hash, piece.offset + row) for piece in chunk.image_pieces for row in range(piece.num_tokens)
        }
        assert given == expected
        assert {content_hash for content_hash, _ in given.values()} <= self.embeddings

    def read(self, chunk: Chunk) -> SampledToken:
        request = self.scheduler.requests[chunk.request_id]
        for slot in range(len(request.token_ids)):
            place = chunk.block_ids[slot // self.block_size], slot % self.block_size
            assert self.contents[place] == tuple(request.cache_keys[: slot + 1]), "a row reads another's slots"
        return SampledToken(scripted_token(request.cache_keys))
