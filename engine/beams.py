"""Beam search: several continuations of one prompt, each a row on forked blocks, and the best of what they end in.

The rule is that of transformers' `GenerationMixin._beam_search` with its defaults (length penalty 1, no early stopping): each step keeps
the best continuations of all beams together, and the search ends when no running beam can beat the worst of as many finished ones.
A search takes a step when all of its beams are wholly computed: then each has made its offer in its present state. Earlier offers, of a
search that was preempted or of a step that failed, count for nothing, since their beams are computed again.
A beam that waits for the others keeps its blocks. That ends, because the scheduler preempts a search as a whole (`engine.searches`), never
the oldest, and because a search that could not run alone is refused.
A client of the scheduler; knows nothing of tensors.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from engine.request import FinishReason, InvalidRequestError, Request, StepOutput
from engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Continuation:
    """One token that a beam may go on with."""

    token_id: int
    logprob: float  # after penalties, and temperature where the beams are sampled
    noise: float = 0.0  # what sampling adds to the logarithm to draw without replacement (Gumbel's trick)


@dataclass(frozen=True, slots=True)
class _Candidate:
    beam_id: str
    token_id: int
    score: float  # sum of log-probabilities
    ends: bool


@dataclass(frozen=True, slots=True)
class _Finished:
    token_ids: list[int]
    score: float  # mean log-probability


@dataclass(slots=True)
class BeamSearch:
    """One request's search. `scores` has the running beams, best first; `offers` what those that were computed may go on with."""

    request: Request
    num_beams: int
    end_token_ids: frozenset[int]
    max_tokens: int
    scores: dict[str, float] = field(default_factory=dict)
    offers: dict[str, Sequence[Continuation]] = field(default_factory=dict)
    finished: list[_Finished] = field(default_factory=list)
    num_named: int = 1

    @property
    def num_kept(self) -> int:
        """Continuations that a step looks at: enough that `num_beams` go on although others end."""
        return max(2, 1 + len(self.end_token_ids)) * self.num_beams

    def candidates(self, num_output_tokens: int) -> list[_Candidate]:
        """The best continuations of all beams, in the order in which they were chosen."""
        found = [
            (score + offer.logprob + offer.noise, beam_id, score, offer)
            for beam_id, score in self.scores.items()
            for offer in self.offers[beam_id]
        ]
        found.sort(key=lambda entry: -entry[0])
        return [
            _Candidate(beam_id, offer.token_id, score + offer.logprob, self._ends(offer, num_output_tokens))
            for _, beam_id, score, offer in found[: self.num_kept]
        ]

    def keep_finished(self, candidates: Sequence[_Candidate], outputs: Mapping[str, list[int]]) -> None:
        """Those of the first `num_beams` candidates that end join the finished ones, of which as many stay."""
        for candidate in candidates[: self.num_beams]:
            if candidate.ends:
                token_ids = [*outputs[candidate.beam_id], candidate.token_id]
                self.finished.append(_Finished(token_ids, candidate.score / len(token_ids)))
        self.finished.sort(key=lambda finished: -finished.score)
        del self.finished[self.num_beams :]

    def can_improve(self, best_score: float, num_output_tokens: int) -> bool:
        return len(self.finished) < self.num_beams or best_score / num_output_tokens > self.finished[-1].score

    def _ends(self, offer: Continuation, num_output_tokens: int) -> bool:
        return offer.token_id in self.end_token_ids or num_output_tokens + 1 >= self.max_tokens


class Beams:
    """All searches of an engine."""

    def __init__(self, scheduler: Scheduler, eos_token_ids: Collection[int]) -> None:
        self.scheduler = scheduler
        self._eos_token_ids = frozenset(eos_token_ids)
        self._searches: dict[str, BeamSearch] = {}
        self._search_of: dict[str, BeamSearch] = {}  # by any of its beams

    def check(self, request: Request) -> None:
        """Raises InvalidRequestError for a search that could never run."""
        params, config, blocks = request.params, self.scheduler.config, self.scheduler.blocks
        if params.num_beams > config.max_batch_size:
            raise InvalidRequestError(
                f"num_beams: {params.num_beams} is not allowed, only up to {config.max_batch_size} (--max-batch-size)"
            )
        if params.max_tokens == 0:
            raise InvalidRequestError("num_beams: only 1 is allowed where no token is wanted")
        if params.logprobs is not None or params.grammar is not None or params.reads_prompt:
            raise InvalidRequestError("num_beams: only 1 is allowed together with logprobs or a grammar")
        num_slots = self._max_slots(request)
        num_shared = request.num_prompt_tokens // blocks.block_size if config.enable_prefix_caching else 0
        num_needed = num_shared + params.num_beams * (blocks.num_blocks_for(num_slots) - num_shared + 1)
        if num_needed > blocks.num_blocks:
            raise InvalidRequestError(
                f"num_beams: {params.num_beams} beams of up to {num_slots} tokens need {num_needed} blocks and the KV cache has "
                f"{blocks.num_blocks}; lower num_beams or max_tokens, or raise --cache-max-entry-count"
            )

    def begin(self, request: Request) -> None:
        """A request that the scheduler has taken. Its own row is the first beam."""
        ends = frozenset(request.params.stop_token_ids) | (frozenset() if request.params.ignore_eos else self._eos_token_ids)
        max_tokens = self._max_slots(request) - request.num_prompt_tokens
        search = BeamSearch(request, request.params.num_beams, ends, max_tokens, scores={request.request_id: 0.0})
        self._searches[request.request_id] = self._search_of[request.request_id] = search
        self.scheduler.reserve(request.request_id, request.params.num_beams)

    def search_of(self, beam_id: str) -> BeamSearch | None:
        return self._search_of.get(beam_id)

    def rank(self, beam_id: str) -> int:
        """0 for the best running beam of its search."""
        return list(self._search_of[beam_id].scores).index(beam_id)

    def offer(self, beam_id: str, continuations: Sequence[Continuation]) -> None:
        """What a beam that was computed may go on with."""
        self._search_of[beam_id].offers[beam_id] = continuations

    def advance(self) -> list[StepOutput]:
        """A step of every search whose beams are all computed; the outputs of those that are done."""
        ready = [search for search in self._searches.values() if all(self.scheduler.is_computed(beam_id) for beam_id in search.scores)]
        return [output for search in ready if (output := self._advance(search)) is not None]

    def end(self, request_id: str, reason: FinishReason, *, error: str | None = None) -> StepOutput | None:
        """End a whole search, given its request or any of its beams. None: unknown."""
        search = self._searches.get(request_id) or self._search_of.get(request_id)  # its own row may have been dropped
        return None if search is None else self._end(search, StepOutput(request_id="", finish_reason=reason, error=error))

    def _advance(self, search: BeamSearch) -> StepOutput | None:
        outputs = {beam_id: self.scheduler.requests[beam_id].output_token_ids for beam_id in search.scores}
        num_tokens = len(next(iter(outputs.values())))
        candidates = search.candidates(num_tokens)
        search.keep_finished(candidates, outputs)
        going_on = sorted((candidate for candidate in candidates if not candidate.ends), key=lambda candidate: -candidate.score)
        going_on = going_on[: search.num_beams]
        if not going_on or not search.can_improve(going_on[0].score, num_tokens + 1):
            best = search.finished[0].token_ids if search.finished else next(iter(outputs.values()))
            ends = bool(best) and best[-1] in search.end_token_ids
            reason = FinishReason.STOP if ends else FinishReason.LENGTH
            return self._end(search, StepOutput(request_id="", token_ids=best, finish_reason=reason))
        self._go_on(search, going_on)
        return None

    def _go_on(self, search: BeamSearch, going_on: Sequence[_Candidate]) -> None:
        """Fork the beams that several candidates continue, drop those that none does, and append the tokens."""
        old, search.scores = list(search.scores), {}
        search.offers.clear()
        taken: set[str] = set()
        appended: list[tuple[str, int]] = []
        for candidate in going_on:
            beam_id = candidate.beam_id
            if beam_id in taken:
                beam_id = f"{search.request.request_id}/{search.num_named}"
                search.num_named += 1
                self.scheduler.fork(search.request.request_id, candidate.beam_id, beam_id)
                self._search_of[beam_id] = search
            taken.add(beam_id)
            search.scores[beam_id] = candidate.score
            appended.append((beam_id, candidate.token_id))
        for beam_id in old:
            if beam_id not in taken:
                self.scheduler.drop(beam_id)
                del self._search_of[beam_id]
        for beam_id, token_id in appended:  # after all forks, which copy what their parents have
            self.scheduler.append(beam_id, token_id)

    def _end(self, search: BeamSearch, output: StepOutput) -> StepOutput:
        request = search.request
        for beam_id in search.scores:
            self.scheduler.drop(beam_id)
            del self._search_of[beam_id]
        del self._searches[request.request_id]
        self.scheduler.unreserve(request.request_id)
        self.scheduler.num_output_tokens += 0 if request.prompt.is_probe else len(output.token_ids)
        return StepOutput(
            request_id=request.request_id,
            token_ids=output.token_ids,
            finish_reason=output.finish_reason,
            error=output.error,
            num_cached_tokens=request.num_cached,
        )

    def _max_slots(self, request: Request) -> int:
        max_tokens, session_len = request.params.max_tokens, self.scheduler.session_len
        return session_len if max_tokens is None else min(session_len, request.num_prompt_tokens + max_tokens)
