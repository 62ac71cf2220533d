"""The engine, synchronous and complete: add requests, step, read what came out. Schedule → execute → commit, pictures beside it.

Used by the engine process, by tests and offline. Knows nothing of sockets or of text.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace

import torch
from torch import Tensor

from engine.announced import AnnouncedImages
from engine.beams import Beams, BeamSearch, Continuation
from engine.config import EngineConfig
from engine.continuations import continuations
from engine.encoding import EmbeddingCache, Encoding, choose_batch
from engine.first_token import FirstTokenClock
from engine.guided import Guides, Mask
from engine.pacing import Pace
from engine.reading import Reading
from engine.request import (
    EngineError,
    EngineInfo,
    EngineStats,
    FinishReason,
    ImageInput,
    InvalidRequestError,
    Plan,
    Prompt,
    Request,
    RequestFailure,
    SampledToken,
    SamplingParams,
    StepOutput,
)
from engine.sampler import SamplingRow, hash64, sample
from engine.scheduler import Scheduler
from engine.workers import Ranks

logger = logging.getLogger(__name__)

IDLE_ENCODE_S = 0.05  # a slice of encoding when no row decodes; new messages are read after it
IDLE_COMPILE_S = 0.01  # how long a step waits for a grammar when nothing else is to be done


class Engine:
    """One model, loaded. `step()` does a bounded piece of work."""

    def __init__(self, config: EngineConfig, *, on_progress: Callable[[float], None] = lambda fraction: None) -> None:
        started = time.monotonic()
        self.ranks = Ranks(config, on_progress=on_progress)
        self.runner = self.ranks.runner
        self.config = self._bounded_by_memory(config)
        self.scheduler = Scheduler(self.config, num_blocks=self.runner.num_blocks, eos_token_ids=self.runner.eos_token_ids)
        self.beams = Beams(self.scheduler, self.runner.eos_token_ids)
        self.embeddings = EmbeddingCache(config.embedding_cache_bytes)
        self.encoding: Encoding | None = None
        self._encoded_alone: set[bytes] = set()  # content hashes of pictures whose batch failed: one of them may be why
        self.announced = AnnouncedImages()
        self.guides = Guides(vocab_size=self.runner.vocab_size, eos_token_ids=self.runner.eos_token_ids)
        self._compiling: dict[str, Future[None]] = {}  # held requests and what they wait for
        self._readings: dict[str, Reading] = {}  # of prompts that are not wholly computed
        self._probes: dict[str, Prompt] = {}
        self.clock = FirstTokenClock()
        self.pace = Pace(config.encoder_share, max_prefill_tokens=config.max_prefill_token_num)
        self._own = EngineStats()
        self._num_requests = 0
        self._load_time_s = time.monotonic() - started

    @property
    def info(self) -> EngineInfo:
        runner = self.runner
        assert self.config.session_len is not None
        return EngineInfo(
            model_type=runner.model_config.model_type,
            device=str(runner.device),
            dtype=str(runner.dtype).removeprefix("torch."),
            tp=self.config.tp,
            session_len=self.config.session_len,
            block_size=self.config.cache_block_seq_len,
            num_blocks=runner.num_blocks,
            vocab_size=runner.vocab_size,
            hidden_size=runner.hidden_size,
            eos_token_ids=runner.eos_token_ids,
            load_time_s=self._load_time_s,
        )

    def set_vocabulary(self, vocabulary: str) -> None:
        """What the token ids mean, as the tokenizers library writes it: without it no grammar can be followed."""
        self.guides.vocabulary = vocabulary

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.encoding is not None or bool(self.announced)

    def add(self, request_id: str, prompt: Prompt, params: SamplingParams) -> None:
        """Queue a request. Raises InvalidRequestError, PromptTooLongError or QueueFullError."""
        try:
            request = self._queued(request_id, prompt, params)
        except EngineError:
            self.drop_unwanted_encoding()  # of its pictures, which were announced
            raise
        if prompt.is_probe:
            self._probes[request_id] = prompt
        self.clock.added(request_id)
        if self.encoding is not None and any(image in self.encoding for image in prompt.images):
            self.clock.begun(request_id)
        if params.num_beams > 1:
            self.beams.begin(request)
        if params.grammar is not None:
            self.scheduler.hold(request_id)
            self._compiling[request_id] = self.guides.begin(request_id, params.grammar, tenant=prompt.tenant)
        if not prompt.is_probe:
            self._count_embeddings(prompt)

    def abort(self, request_id: str) -> StepOutput | None:
        """End a request; its blocks are free on return. None where it is unknown or has ended."""
        output = self.beams.end(request_id, FinishReason.ABORT) or self.scheduler.abort(request_id)
        self._forget(request_id)
        self.drop_unwanted_encoding()
        return output

    def announce(self, owner: str, image: ImageInput) -> None:
        """A picture of a prompt that is being made: encoded ahead while no request needs the encoder. `owner` stands for the prompt.

        One that fills the window is ignored: no request can have it.
        """
        fits = image.num_tokens < self.scheduler.session_len
        if self.runner.encoder is not None and fits and not self.embeddings.touch(image.content_hash):
            self.announced.announce(owner, image)

    def withdraw(self, owner: str, *, request_follows: bool) -> None:
        """No more pictures of this prompt. A batch that is being encoded goes on where `request_follows`, and else is given up."""
        self.announced.withdraw(owner)
        if not request_follows:
            self.drop_unwanted_encoding()

    def drop_unwanted_encoding(self) -> None:
        """Stop encoding pictures that no request wants any more, e.g. since the one that they were announced for is refused."""
        if self.encoding and not any(
            self.announced.has(image.content_hash) or self.scheduler.requests_with_image(image.content_hash)
            for image in self.encoding.images
        ):
            self.encoding.cancel()
            self.encoding = None

    def step(self) -> list[StepOutput]:
        """Compute one plan, and a slice of the pictures that wait."""
        started = time.perf_counter()
        requests = self.scheduler.requests
        is_counted = not requests or any(request_id not in self._probes for request_id in requests)  # without any: of announced pictures
        self._release_compiled()
        num_decoding, num_prefilling = self.scheduler.prefill_load()
        others = {"num_prefilling": num_prefilling, "num_images": len(self._images_needed())}
        if others["num_images"]:
            self.drop_unwanted_encoding()  # it was announced, and its request has not come
        budget = self.pace.prefill_tokens(num_decoding=num_decoding, **others)
        plan = self.scheduler.schedule(max_prefill_tokens=budget)
        for chunk in plan.chunks:
            self.clock.begun(chunk.request_id)
        outputs, tensor_s = self._compute(plan) if plan.chunks else ([], 0.0)
        encode_s, failed = self._encode(self._encode_budget_s(plan, tensor_s, others))
        if is_counted:
            self._count(plan, time.perf_counter() - started, tensor_s, encode_s)
        timed = [self._timed(output) for output in outputs + failed]
        for output in timed:
            if output.finish_reason is not None:
                self._forget(output.request_id)
        return timed

    def stats(self) -> EngineStats:
        counted = self.scheduler.stats()
        own = {
            name: getattr(self._own, name)
            for name in ("num_steps", "num_batched_requests", "max_batched_requests", "num_images_encoded",
                         "num_embedding_cache_hits", "num_embedding_cache_misses", "step_time_s", "overhead_time_s", "encode_time_s")
        }  # fmt: skip
        needed = {image.content_hash for image in self.scheduler.images_needed()}
        requests = self.scheduler.requests.items()
        waiting = [name for name, request in requests if any(image.content_hash in needed for image in request.prompt.images)]
        return replace(
            counted,
            **own,
            num_images_waiting=len(needed),
            embedding_cache_bytes=self.embeddings.num_bytes,
            oldest_waiting_s=self.clock.oldest_waiting_s(),
            oldest_image_waiting_s=self.clock.oldest_s(waiting),
        )

    def check(self) -> None:
        """Raises RankDeadError where another rank has ended, or waits in a step that failed: no step could be computed any more."""
        self.ranks.check()

    def close(self) -> None:
        if self.encoding is not None:
            self.encoding.cancel()
        self.guides.close()
        self.ranks.close()

    def _bounded_by_memory(self, config: EngineConfig) -> EngineConfig:
        """The window cannot be longer than the cache."""
        assert config.session_len is not None
        num_slots = self.runner.num_blocks * config.cache_block_seq_len
        if num_slots < config.session_len:
            logger.warning(
                "the KV cache holds %d slots, so the window shrinks from %d to that (--cache-max-entry-count, --session-len)",
                num_slots,
                config.session_len,
            )
        return replace(config, session_len=min(config.session_len, num_slots))

    def _queued(self, request_id: str, prompt: Prompt, params: SamplingParams) -> Request:
        """A request that the scheduler has taken."""
        self._check_prompt(prompt, params)
        if params.num_beams > 1:
            self.beams.check(Request(request_id, prompt, params))
        self._num_requests += 1
        if params.seed is None:
            params = replace(params, seed=self.config.seed + self._num_requests)
        request = Request(request_id, prompt, params)
        self.scheduler.add(request)
        return request

    def _check_prompt(self, prompt: Prompt, params: SamplingParams) -> None:
        vocab_size = self.runner.vocab_size
        if prompt.token_ids and not (min(prompt.token_ids) >= 0 and max(prompt.token_ids) < vocab_size):
            raise InvalidRequestError(f"the prompt holds a token id outside 0 … {vocab_size - 1}")
        if any(not 0 <= token_id < vocab_size for token_id in (*params.logit_bias, *params.stop_token_ids)):
            raise InvalidRequestError(f"logit_bias or stop_token_ids name a token id outside 0 … {vocab_size - 1}")
        if prompt.images and self.runner.encoder is None:
            raise InvalidRequestError("this model takes no images")
        if params.grammar is not None and self.guides.vocabulary is None:
            raise InvalidRequestError("grammars cannot be followed: the engine was not told its vocabulary")

    def _compute(self, plan: Plan) -> tuple[list[StepOutput], float]:
        """Execute and commit a plan; seconds of tensor work. Out of memory ends the request with the largest chunk and nothing else.

        With tensor-parallel ranks it ends the engine too, where it comes before the sampling: `check` says so after the step.
        """
        started = time.perf_counter()
        try:
            sampled, reasons = self._execute(plan)
        except torch.OutOfMemoryError:
            largest = max(plan.chunks, key=lambda chunk: len(chunk.token_ids)).request_id
            logger.exception("out of device memory; the request with the largest chunk ends")
            reason = "out of device memory; lower --cache-max-entry-count or --max-prefill-token-num"
            failed = self._fail(largest, RequestFailure(reason))
            return ([failed] if failed else []), time.perf_counter() - started
        tensor_s = time.perf_counter() - started
        failures = [self._fail(request_id, reason) for request_id, reason in reasons.items()]
        outputs = [output for output in failures if output]
        outputs += [self._with_reading(output) for output in self.scheduler.commit(plan, sampled)]
        outputs += self.beams.advance()
        self._shrink_embeddings()
        return outputs, tensor_s

    @torch.inference_mode()
    def _execute(self, plan: Plan) -> tuple[dict[str, SampledToken], dict[str, RequestFailure]]:
        """The sampled tokens, and why requests cannot go on: their logits overflowed, or their grammar failed.

        Out of memory has changed nothing: the chunks of the others are computed again.
        """
        executed = self.ranks.execute(plan, self.embeddings.tensors)
        sampled = ({}, {}) if executed.logits is None else self._choose(executed.sample_ids, executed.logits)
        self._read(plan, executed.readings)
        return sampled

    def _choose(self, request_ids: Sequence[str], logits: Tensor) -> tuple[dict[str, SampledToken], dict[str, RequestFailure]]:
        """As `_execute`, of all rows that sample. Beams are offered their continuations."""
        is_finite = logits.amax(-1).isfinite().tolist()
        offers, others = {}, []
        for index, request_id in enumerate(request_ids):
            if search := self.beams.search_of(request_id):
                offers[request_id] = self._continuations(search, request_id, logits[index])
            else:
                others.append(index)
        if offers:
            logits = logits[others]
        tokens, reasons = self._sample([request_ids[index] for index in others], logits) if others else ({}, {})
        for beam_id, offered in offers.items():
            self.beams.offer(beam_id, offered)
        for request_id, finite in zip(request_ids, is_finite, strict=True):
            if not finite:
                reasons[request_id] = RequestFailure("the model computed no finite numbers for this input")
        return tokens, reasons

    def _sample(self, request_ids: Sequence[str], logits: Tensor) -> tuple[dict[str, SampledToken], dict[str, RequestFailure]]:
        masks, reasons = self.guides.masks(request_ids)
        rows = [_sampling_row(self.scheduler.requests[request_id], masks.get(request_id)) for request_id in request_ids]
        tokens = dict(zip(request_ids, sample(logits, rows, eos_token_ids=self.runner.eos_token_ids), strict=True))
        self.guides.advance({request_id: tokens[request_id].token_id for request_id in masks})
        return tokens, reasons

    def _continuations(self, search: BeamSearch, beam_id: str, logits: Tensor) -> list[Continuation]:
        """What a beam may go on with. Beams of one search draw different numbers."""
        row = _sampling_row(self.scheduler.requests[beam_id], None)
        row = replace(row, seed=hash64(row.seed, self.beams.rank(beam_id)))
        kept = {"num_kept": search.num_kept, "min_kept": max(2, 1 + len(search.end_token_ids))}
        return continuations(logits, row, eos_token_ids=self.runner.eos_token_ids, **kept)

    def _fail(self, request_id: str, reason: RequestFailure) -> StepOutput | None:
        """End a request, given it or one of its beams, with an error. None where it has ended."""
        error = reason.message
        output = self.beams.end(request_id, FinishReason.ERROR, error=error) or self.scheduler.fail(request_id, error)
        return output and replace(output, is_refusal=reason.is_refusal)

    def _release_compiled(self) -> None:
        """Let those run whose grammar is ready. Waits a moment where nothing else could run."""
        are_all_held = len(self._compiling) == self.scheduler.num_waiting and not self.scheduler.num_running
        if self._compiling and are_all_held and not self._has_pictures_to_encode:
            wait(self._compiling.values(), timeout=IDLE_COMPILE_S, return_when=FIRST_COMPLETED)
        for request_id in [request_id for request_id, work in self._compiling.items() if work.done()]:
            del self._compiling[request_id]
            self.scheduler.release(request_id)

    def _forget(self, request_id: str) -> None:
        """What is kept beside a request that has ended."""
        self.clock.ended(request_id)
        self._readings.pop(request_id, None)
        self._compiling.pop(request_id, None)
        self.guides.end(request_id)
        if probe := self._probes.pop(request_id, None):
            for image in probe.images:
                self.embeddings.discard(image.content_hash)
                self.scheduler.image_forgotten(image.content_hash)
        self._shrink_embeddings()

    def _read(self, plan: Plan, readings: dict[str, Reading]) -> None:
        """Add what the plan's chunks read to what their requests have. A preempted request begins anew."""
        for chunk in plan.chunks:
            if reading := readings.get(chunk.request_id):
                if chunk.start == 0:
                    self._readings[chunk.request_id] = Reading()
                self._readings[chunk.request_id].add(reading)

    def _with_reading(self, output: StepOutput) -> StepOutput:
        reading = self._readings.pop(output.request_id, None)
        return output if reading is None else replace(output, embedding=reading.mean(), prompt_logprobs=reading.logprobs)

    def _timed(self, output: StepOutput) -> StepOutput:
        """A request's first output says where its time went."""
        timings_s = self.clock.ended(output.request_id)
        return output if timings_s is None else replace(output, timings_s=timings_s)

    def _encode_budget_s(self, plan: Plan, step_s: float, others: Mapping[str, int]) -> float:
        """For how long to encode after this step, which took `step_s`: what the pace allows where rows decode, else for a while."""
        num_decoding = sum(len(chunk.token_ids) == 1 for chunk in plan.chunks)
        num_prefill_tokens = sum(len(chunk.token_ids) for chunk in plan.chunks if len(chunk.token_ids) > 1)
        if plan.chunks:
            self.pace.stepped(step_s, num_decoding=num_decoding, num_prefill_tokens=num_prefill_tokens)
        return self.pace.encode_s(step_s, num_decoding=num_decoding, **others) if num_decoding else IDLE_ENCODE_S

    def _encode(self, budget_s: float) -> tuple[float, list[StepOutput]]:
        """Encode for about `budget_s`; seconds taken and requests that failed."""
        if self.encoding is None:
            self.encoding = self._next_encoding()
            if self.encoding is None:
                return 0.0, []
            for request_id in self._requests_with(self.encoding):
                self.clock.begun(request_id)
        started = time.perf_counter()
        self.encoding.run(budget_s)
        taken_s = time.perf_counter() - started
        return taken_s, self._finish_encoding() if self.encoding.is_done else []

    def _next_encoding(self) -> Encoding | None:
        """Of pictures that requests need or, where they need none, of announced ones."""
        needed, encoder = self._images_needed(), self.runner.encoder
        if encoder is None:
            return None
        if needed:
            self.scheduler.encoding_begun()
        else:
            needed = self._images_announced()
        if not needed:
            return None
        if needed[0].content_hash in self._encoded_alone:
            return Encoding(encoder, needed[:1], self.runner.device)
        needed = [image for image in needed if image.content_hash not in self._encoded_alone]
        return Encoding(encoder, choose_batch(encoder, needed, max_pixels=self.runner.part_pixels), self.runner.device)

    @property
    def _has_pictures_to_encode(self) -> bool:
        return self.encoding is not None or bool(self._images_needed() or self._images_announced())

    def _images_needed(self) -> list[ImageInput]:
        """That are to be encoded for requests. Not ahead of a full cache: an embedding stays until its request has computed it."""
        return self.scheduler.images_needed(ahead=not self.embeddings.is_over_limit)

    def _images_announced(self) -> list[ImageInput]:
        """That may be encoded ahead of their requests."""
        return [] if self.embeddings.is_over_limit else self.announced.needed()

    def _finish_encoding(self) -> list[StepOutput]:
        """Requests that fail with a picture: one that was encoded alone. Those of a batch that failed are encoded one by one."""
        encoding, self.encoding = self.encoding, None
        assert encoding is not None
        content_hashes = {image.content_hash for image in encoding.images}
        if encoding.result is None and len(content_hashes) > 1:
            self._encoded_alone = content_hashes.union(filter(self.scheduler.requests_with_image, self._encoded_alone))
            return []
        self._encoded_alone -= content_hashes
        if encoding.result is None:
            for image in encoding.images:
                self.announced.tried(image.content_hash)
            reason = RequestFailure("a picture could not be encoded")
            failures = [self._fail(request_id, reason) for request_id in self._requests_with(encoding)]
            return [output for output in failures if output]
        for image, embedding in zip(encoding.images, encoding.result, strict=True):
            self.announced.encoded(image.content_hash)
            self.embeddings.add(image.content_hash, embedding)
            self.scheduler.image_ready(image.content_hash)
        for request_id in self._requests_with(encoding):
            self.clock.encoded(request_id)
        num_images = len(content_hashes - self._probe_images())
        self._own = replace(self._own, num_images_encoded=self._own.num_images_encoded + num_images)
        self._shrink_embeddings()
        return []

    def _requests_with(self, encoding: Encoding) -> list[str]:
        return sorted({request_id for image in encoding.images for request_id in self.scheduler.requests_with_image(image.content_hash)})

    def _probe_images(self) -> set[bytes]:
        return {image.content_hash for probe in self._probes.values() for image in probe.images}

    def _shrink_embeddings(self) -> None:
        if self.embeddings.is_over_limit:
            for content_hash in self.embeddings.shrink(self.scheduler.pinned_images()):
                self.scheduler.image_forgotten(content_hash)

    def _count_embeddings(self, prompt: Prompt) -> None:
        num_hits = sum(self.embeddings.touch(image.content_hash) for image in prompt.images)
        own, num_misses = self._own, len(prompt.images) - num_hits
        self._own = replace(
            own,
            num_embedding_cache_hits=own.num_embedding_cache_hits + num_hits,
            num_embedding_cache_misses=own.num_embedding_cache_misses + num_misses,
        )

    def _count(self, plan: Plan, step_s: float, tensor_s: float, encode_s: float) -> None:
        own = self._own
        self._own = replace(
            own,
            num_steps=own.num_steps + bool(plan.chunks),
            num_batched_requests=len(plan.chunks),
            max_batched_requests=max(own.max_batched_requests, len(plan.chunks)),
            step_time_s=own.step_time_s + step_s,
            overhead_time_s=own.overhead_time_s + step_s - tensor_s - encode_s,
            encode_time_s=own.encode_time_s + encode_s,
        )


def _sampling_row(request: Request, mask: Mask | None) -> SamplingRow:
    assert request.params.seed is not None
    return SamplingRow(
        params=request.params,
        prompt_token_ids=request.distinct_prompt_ids,
        output_counts=request.output_counts,
        num_output_tokens=request.num_output_tokens,
        seed=request.params.seed,
        mask=mask,
    )
