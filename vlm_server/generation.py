"""One request's answers while they are written: the engine's tokens in, pieces of text, reasoning and calls out.

Submits one generation per answer, merges their steps, ends an answer at its stop string and closes the engine's generators
whatever happens. Knows nothing of HTTP or of the shape of a response.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeVar

from engine.request import FinishReason, InvalidRequestError, Prompt, SamplingParams, StepOutput, TokenLogprobs
from vlm_server.aborting import AbortSwitch
from vlm_server.backend import Engine, Tokenizer
from vlm_server.detokenizer import Detokenizer, TextDecoder
from vlm_server.errors import ApiError, bad_request, to_api_error
from vlm_server.metrics import Metrics
from vlm_server.parsing.answer import AnswerParser
from vlm_server.parsing.events import Event, merged
from vlm_server.protocol import GenerationFields
from vlm_server.sampling import for_choice
from vlm_server.stage_timings import StageTimings

TOOL_CALLS = "tool_calls"  # the finish reason of an answer that ended with calls

Item = TypeVar("Item")

NO_PROMPT = Prompt(token_ids=(), cache_keys=())  # of a request that was aborted before it had one

MAX_DELTAS_AHEAD = 64  # of several answers, that are made and not read; then their engine's queues fill, which have limits

_NUM_TOKENS_BEFORE = 8  # of the prompt, that say how the answer's first token is written


@dataclass(slots=True)
class Delta:
    """What one step added to one answer: its text, and with a parser what that turned out to be."""

    index: int
    text: str
    logprobs: list[TokenLogprobs] | None  # of the tokens whose text is in it or before it
    finish_reason: str | None  # a FinishReason or TOOL_CALLS
    events: list[Event] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # characters of the answer before each token of `logprobs`
    stop_string: str | None = None  # with a finish reason: the stop string that ended the answer
    token_ids: list[int] = field(default_factory=list)  # generated since the delta before, whether their text is out or not
    token_logprobs: list[float] | None = None  # one per entry of `token_ids`, where log-probabilities are wanted
    prompt_logprobs: list[TokenLogprobs] | None = None  # in the answer's first delta, where they are wanted: of all tokens but the first


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    image_tokens: int
    reasoning_tokens: int | None = None  # None where nobody counts them

    def as_dict(self) -> dict[str, object]:
        details = {"accepted_prediction_tokens": None, "audio_tokens": None, "rejected_prediction_tokens": None}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens, "image_tokens": self.image_tokens},
            "completion_tokens_details": None if self.reasoning_tokens is None else {"reasoning_tokens": self.reasoning_tokens, **details},
        }


@dataclass(slots=True)
class _PendingLogprobs:
    """A token whose text is not released: it may lack bytes, or be the beginning of a stop string."""

    token: TokenLogprobs
    start: int  # characters decoded before it
    end: int | None = None  # after it; None while its character lacks bytes

    def is_out(self, num_characters: int) -> bool:
        """Whether its text is within the first `num_characters`."""
        return self.end is not None and self.end <= num_characters


class Answer:
    """One answer: counts its tokens, holds its text back as long as it may change."""

    def __init__(
        self, index: int, params: SamplingParams, detokenizer: Detokenizer, *, includes_stop: bool, parser: AnswerParser | None = None
    ) -> None:
        self.index = index
        self.params = params
        self.finish_reason: FinishReason | None = None
        self.token_ids: list[int] = []  # end token included
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs] | None = None  # to be given with the next delta
        self._token_logprobs: list[float] = []  # as `token_ids`, where they are wanted
        self._num_given = 0  # tokens that deltas had
        self._detokenizer = detokenizer
        self._includes_stop = includes_stop
        self._parser = parser
        self._pending: deque[_PendingLogprobs] = deque()  # those without an end last
        self._starts: list[int] = []  # of each token: characters decoded before it; kept where reasoning is counted

    @property
    def num_reasoning_tokens(self) -> int | None:
        """Tokens that begin between the markers of the reasoning."""
        parser = self._parser
        return sum(map(parser.is_reasoning_at, self._starts)) if parser is not None and parser.counts_reasoning else None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def take(self, step: StepOutput) -> Delta | None:
        """What the step adds; None while nothing can be released. Raises ApiError where the engine reports an error."""
        _raise_engine_error(step)
        return self._taken(step)

    def abort(self) -> Delta:
        """The last piece of an answer that is ended from outside: what was held back."""
        delta = self._taken(StepOutput(request_id="", finish_reason=FinishReason.ABORT))
        assert delta is not None
        return delta

    def _taken(self, step: StepOutput) -> Delta | None:
        if step.prompt_logprobs is not None:
            self.prompt_logprobs = step.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, step.num_cached_tokens)
        text, events = "", list[Event]()
        for place in range(len(step.token_ids)):
            added = self._add(step, place)
            text += added
            events += self._parsed(added)
        if step.finish_reason is not None and not self._is_over:
            rest = self._detokenizer.finish()
            text += rest
            events += self._parsed(rest)
        self.finish_reason = FinishReason.STOP if self._is_over else step.finish_reason
        if self._parser is not None and self.finish_reason is not None:
            events += self._parser.finish()
        released = self._released()
        has_news = bool(text) if self._parser is None else bool(events)
        if not (has_news or released or self.finish_reason or self.prompt_logprobs is not None):
            return None
        return self._delta(text, events, released)

    def _delta(self, text: str, events: list[Event], released: list[_PendingLogprobs]) -> Delta:
        """With the tokens that were generated since the last one."""
        logprobs = [pending.token for pending in released] if self.params.logprobs is not None else None
        num_decoded = self._detokenizer.num_decoded  # without the bytes at an answer's end that are no character
        offsets = [min(pending.start, num_decoded) for pending in released]
        delta = Delta(self.index, text, logprobs, self.reported_reason, merged(events), offsets)
        delta.stop_string = self._detokenizer.stop_string
        delta.token_ids = self.token_ids[self._num_given :]
        if self.params.logprobs is not None:
            delta.token_logprobs = self._token_logprobs[self._num_given :]
        delta.prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        self._num_given = len(self.token_ids)
        return delta

    @property
    def _is_over(self) -> bool:
        """Whether what the engine still gives is not part of the answer."""
        return self._detokenizer.is_stopped or (self._parser is not None and self._parser.is_done)

    @property
    def reported_reason(self) -> str | None:
        """As clients are told it."""
        has_calls = self._parser is not None and self._parser.has_calls
        return TOOL_CALLS if has_calls and self.finish_reason is FinishReason.STOP else self.finish_reason

    def _parsed(self, text: str) -> list[Event]:
        return self._parser.feed(text) if self._parser is not None else []

    def _add(self, step: StepOutput, place: int) -> str:
        if self._is_over:
            return ""
        self.token_ids.append(step.token_ids[place])
        if step.logprobs is not None:
            self._token_logprobs.append(step.logprobs[place].logprob)
        is_end_token = step.finish_reason is FinishReason.STOP and place == len(step.token_ids) - 1
        if is_end_token and not self._includes_stop:
            return ""
        start_before, num_before = self._detokenizer.start, self._detokenizer.num_decoded
        text = self._detokenizer.add(step.token_ids[place])
        start = self._detokenizer.start
        if self._parser is not None and self._parser.counts_reasoning:
            self._starts.append(start)
        if step.logprobs is not None:
            self._pending.append(_PendingLogprobs(step.logprobs[place], start))
        if start < start_before:
            self._lower_starts(start)
        if self._detokenizer.num_decoded > num_before:
            self._set_ends(start)
        return text

    def _lower_starts(self, start: int) -> None:
        """Tokens that looked like characters of their own, and are bytes of one that began before them, begin there too."""
        for place in range(len(self._starts) - 1, -1, -1):
            if self._starts[place] < start:
                break
            self._starts[place] = start
        for pending in reversed(self._pending):
            if pending.start < start:
                break
            pending.start = start

    def _set_ends(self, start: int) -> None:
        """The tokens whose text is decoded now end where the last one begins, at `start`, or with it."""
        num_decoded = self._detokenizer.num_decoded
        for pending in reversed(self._pending):
            if pending.end is not None:
                break
            if pending.start < num_decoded:
                pending.end = start if pending.start < start else num_decoded

    def _released(self) -> list[_PendingLogprobs]:
        """The tokens whose text is out; at the end all but those of the stop string."""
        num_characters = self._detokenizer.num_characters
        if self._detokenizer.is_stopped:
            released = [pending for pending in self._pending if pending.start < num_characters]
            self._pending.clear()
            return released
        released = []
        while self._pending and (self.finish_reason is not None or self._pending[0].is_out(num_characters)):
            released.append(self._pending.popleft())
        return released


@dataclass(slots=True)
class FinishedAnswer:
    """All deltas of one answer, put together."""

    pieces: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_string: str | None = None
    token_ids: list[int] = field(default_factory=list)
    token_logprobs: list[float] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def mean_logprob(self) -> float:
        """Of all its tokens, the end token included."""
        return sum(self.token_logprobs or ()) / max(1, len(self.token_logprobs or ()))

    def add(self, delta: Delta) -> None:
        """The answer's next piece."""
        self.pieces.append(delta.text)
        self.events += delta.events
        self.offsets += delta.offsets
        self.token_ids += delta.token_ids
        self.logprobs = _extended(self.logprobs, delta.logprobs)
        self.token_logprobs = _extended(self.token_logprobs, delta.token_logprobs)
        self.prompt_logprobs = _extended(self.prompt_logprobs, delta.prompt_logprobs)
        self.finish_reason, self.stop_string = delta.finish_reason, delta.stop_string


class _Aborted(Exception):
    """Told to who reads the answers: no more comes of those that have not ended."""


@dataclass(slots=True)
class _PromptScores:
    """What the first answer reads off its prompt, for the others to the same prompt, which wait for it."""

    logprobs: list[TokenLogprobs] | None = None
    is_read: asyncio.Event = field(default_factory=asyncio.Event)


class Generation:
    """All answers to one request: as many to each prompt, indices in the prompts' order."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        request: GenerationFields,
        *,
        stop_words: Sequence[str] = (),
        request_id: str,
        metrics: Metrics,
        abort: AbortSwitch | None = None,
        decoder: TextDecoder | None = None,
        new_parser: Callable[[], AnswerParser] | None = None,
    ) -> None:
        """stop_words: strings that end an answer beside the request's own. decoder: in place of the tokenizer.

        abort: ends all answers where they are, with FinishReason.ABORT.

        new_parser: makes what reads one answer's text; None for answers that are text alone.
        """
        self._engine = engine
        self._prompts = prompts
        self._num_candidates = request.num_candidates
        self._scores = [_PromptScores() for _ in prompts] if params.prompt_logprobs is not None else []
        self._input_field = request.input_field
        self._request_id = request_id
        self._metrics = metrics
        self._abort = abort
        self.timings_s: dict[str, float] = {}  # of the answer that began first: queue, encode, prefill
        self.first_s: float | None = None  # when the first piece of any answer was there, and the last one so far, on time.monotonic
        self.last_s: float | None = None
        includes_stop = bool(request.include_stop_str_in_output)
        self._answers = [
            Answer(
                index,
                for_choice(params, index % request.num_candidates),
                Detokenizer(
                    decoder or tokenizer,
                    before=prompts[index // request.num_candidates].token_ids[-_NUM_TOKENS_BEFORE:] if request.continues_prompt else (),
                    stops=(*(request.stop or ()), *stop_words),
                    includes_stop=includes_stop,
                    skip_special_tokens=request.skip_special_tokens is not False,
                    min_tokens=params.min_tokens,
                ),
                includes_stop=includes_stop,
                parser=new_parser() if new_parser is not None else None,
            )
            for index in range(len(prompts) * request.num_candidates)
        ]

    @property
    def num_answers(self) -> int:
        return len(self._answers)

    @property
    def finish_reasons(self) -> list[str]:
        """Why answers ended, each reason once."""
        return sorted({str(answer.reported_reason) for answer in self._answers if answer.finish_reason is not None})

    @property
    def token_ids(self) -> list[int]:
        """Of the first answer so far, its end token included."""
        return self._answers[0].token_ids

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Every answer's pieces as they come, once. Closing it aborts what still runs; at its end the prompts' pictures are let go."""
        first_s, last_s = [0.0] * len(self._answers), [0.0] * len(self._answers)
        started_s = time.monotonic()
        is_simple = len(self._answers) == 1 and self._abort is None
        try:
            async with aclosing(self._run(self._answers[0]) if is_simple else self._merged()) as deltas:
                async for delta in deltas:
                    if delta.finish_reason == FinishReason.ABORT:  # what was held back, and no token of this moment
                        yield delta
                        continue
                    now_s = self.last_s = time.monotonic()
                    self.first_s = self.first_s or now_s
                    if last_s[delta.index]:
                        self._metrics.next_token(now_s - last_s[delta.index])
                    else:
                        self._metrics.first_token(now_s - started_s)
                        first_s[delta.index] = now_s
                    last_s[delta.index] = now_s
                    if delta.finish_reason is not None:
                        self._metrics.stages_measured({"generate": now_s - first_s[delta.index]})
                    yield delta
        finally:
            for prompt in self._prompts:
                prompt.close()

    async def collect(self) -> list[FinishedAnswer]:
        """The finished answers, by index."""
        finished = [FinishedAnswer() for _ in self._answers]
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                finished[delta.index].add(delta)
        return finished

    def usage(self) -> Usage:
        """Each prompt counted once, the answers summed."""
        firsts = self._answers[:: self._num_candidates]
        return Usage(
            prompt_tokens=sum(len(prompt.token_ids) for prompt in self._prompts),
            completion_tokens=sum(answer.num_tokens for answer in self._answers),
            cached_tokens=sum(answer.num_cached_tokens for answer in firsts),
            image_tokens=sum(span.num_tokens for prompt in self._prompts for span in prompt.spans),
            reasoning_tokens=_sum_known([answer.num_reasoning_tokens for answer in self._answers]),
        )

    def tell(self, timings: StageTimings) -> None:
        """Adds the stages from the engine's queue on, as far as they are known; `generate` once an answer has ended."""
        if self.first_s is None or self.last_s is None:
            return
        timings.add_until(self.first_s, self.timings_s)
        timings.first_token(self.first_s)
        if self.finish_reasons:
            timings.add_until(self.last_s, {"generate": self.last_s - self.first_s})

    async def _run(self, answer: Answer) -> AsyncGenerator[Delta, None]:
        prompt = self._prompts[answer.index // self._num_candidates]
        scores = self._scores[answer.index // self._num_candidates] if self._scores else None
        if scores is not None and answer.params.prompt_logprobs is None:
            await scores.is_read.wait()
            answer.prompt_logprobs = scores.logprobs
        steps = self._engine.generate(prompt, answer.params, request_id=f"{self._request_id}-{answer.index}")
        async with aclosing(steps):
            try:
                async for step in steps:
                    if scores is not None and step.prompt_logprobs is not None:
                        scores.logprobs = step.prompt_logprobs
                        scores.is_read.set()
                    if step.timings_s is not None:
                        self._metrics.stages_measured(step.timings_s)
                        self.timings_s = self.timings_s or step.timings_s
                    delta = answer.take(step)
                    if delta is not None:
                        yield delta
                    if answer.finish_reason is not None:
                        return
            except InvalidRequestError as error:
                raise to_api_error(error, param=self._input_field) from error
        raise ApiError(500, "internal_error", "the engine ended the answer without a finish reason")

    async def _merged(self) -> AsyncGenerator[Delta, None]:
        """All answers' deltas, each answer computed by a task of its own, so that an abort reaches it whoever waits for what."""
        queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()
        room = asyncio.Semaphore(MAX_DELTAS_AHEAD)
        tasks = [asyncio.create_task(self._pump(answer, queue, room)) for answer in self._answers]
        if self._abort is not None:
            self._abort.when_set(lambda: _end_all(tasks, queue))
        try:
            num_running = len(tasks)
            while num_running:
                item = await queue.get()
                if isinstance(item, _Aborted):
                    break
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_running -= 1
                else:
                    room.release()
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for delta in self._ends(queue):
            yield delta

    def _ends(self, queue: "asyncio.Queue[Delta | Exception | None]") -> Iterator[Delta]:
        """After an abort: what was on its way, then the ends of the answers that have none."""
        while not queue.empty():
            item = queue.get_nowait()
            if isinstance(item, Delta):
                yield item
        for answer in self._answers:
            if answer.finish_reason is None:
                yield answer.abort()

    async def _pump(self, answer: Answer, queue: "asyncio.Queue[Delta | Exception | None]", room: asyncio.Semaphore) -> None:
        """Waits for room after a delta, never with one in its hands: an abort ends it there. Ends and errors need none: they are few."""
        try:
            async with aclosing(self._run(answer)) as deltas:
                async for delta in deltas:
                    queue.put_nowait(delta)
                    await room.acquire()
            queue.put_nowait(None)
        except Exception as error:  # handed to the reader, who raises it
            queue.put_nowait(error)


def _end_all(tasks: "Sequence[asyncio.Task[None]]", queue: "asyncio.Queue[Delta | Exception | None]") -> None:
    for task in tasks:
        task.cancel()
    queue.put_nowait(_Aborted())


def _extended(known: list[Item] | None, more: list[Item] | None) -> list[Item] | None:
    if known is None or more is None:
        return known if more is None else more
    known += more
    return known


def _sum_known(numbers: Sequence[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def _raise_engine_error(step: StepOutput) -> None:
    if step.finish_reason is FinishReason.ERROR:
        if step.is_refusal:
            raise bad_request("grammar_too_complex", step.error or "the grammar cannot be followed")
        raise ApiError(500, "engine_error", step.error or "the engine failed at this request")
    if step.finish_reason is FinishReason.ABORT:
        raise ApiError(503, "aborted", "the request was aborted by the server")
