"""Grammars as token masks: which tokens may come next in each guided request, computed beside the model's work.

A grammar is a text in llguidance's own form; `vlm_server.guided` writes it. One thread compiles, so that a large grammar holds up nobody
else; others follow the live ones: while the model computes a step, they read the last tokens and have the next masks ready.
Knows nothing of tensors, of requests' lives or of HTTP.
"""

import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.request import InvalidRequestError, RequestFailure

MAX_GRAMMAR_BYTES = 1 << 18
MAX_COMPILED = 8  # grammars that are kept for the next request with the same
STACK_BYTES = 512 << 20  # of address space: the library recurses into rules, 4 to 8 KiB for each; MAX_GRAMMAR_BYTES hold 36,000
WAIT_S = 20.0  # for one step's masks; llguidance's own limits end them within a fraction of a second
MAX_MASKS_S = 2.0  # processor time of all masks of a request, beside the next one
MASK_S = 0.002  # for each mask; usual ones take a tenth of that
MAX_STEP_ITEMS = 5_000  # of the parser, for one mask: 5 ms; the library's own 50,000 take more than a second

# A hostile grammar fills memory with the lexer's states (1 to 2 KiB each) and takes seconds with its symbols (20,000 are 4,000 properties).
_LIMITS = LLParserLimits(max_lexer_states=50_000, max_grammar_size=20_000, step_max_items=MAX_STEP_ITEMS, verbose_errors=False)

_ON_A_DEEP_STACK = threading.Lock()  # one at a time: the deepest grammar fills 200 MiB

Result = TypeVar("Result")
Mask = np.ndarray  # (ceil(vocab_size / 32),) int32: bit i of word j says whether token 32 j + i may come


class GrammarError(InvalidRequestError):
    """The grammar cannot be read, or needs more than the limits allow."""


def check_grammar(grammar: str) -> None:
    """Raises GrammarError saying what is wrong. Takes milliseconds, or all time and memory: for a process that can be killed."""
    if len(grammar) > MAX_GRAMMAR_BYTES:
        raise GrammarError(f"{len(grammar)} characters, at most {MAX_GRAMMAR_BYTES} are allowed")
    is_error, messages = _on_a_deep_stack(lambda: LLMatcher.validate_grammar_with_warnings(grammar, limits=_LIMITS))
    if is_error:
        raise GrammarError(messages[0])


def _on_a_deep_stack(work: Callable[[], Result]) -> Result:
    """The result of `work`, from a thread of its own: where a stack ends, so does the process."""
    with _ON_A_DEEP_STACK, ThreadPoolExecutor(1, thread_name_prefix="deep grammar") as thread:
        usual_bytes = threading.stack_size(STACK_BYTES)
        try:
            future = thread.submit(work)  # starts the thread
        finally:
            threading.stack_size(usual_bytes)
        return future.result()


@dataclass(slots=True, eq=False)
class _Guide:
    """One request's place in its grammar."""

    grammar: str
    tenant: str
    mask: Mask
    matcher: LLMatcher | None = None
    used_s: float = 0.0  # processor time of its masks
    num_masks: int = 0
    error: RequestFailure | None = None
    work: "Future[None]" = field(default_factory=Future)  # done: mask or error is that of the next token


class Guides:
    """The grammars of an engine's live requests. One thread owns it; `close()` ends the threads that work for it."""

    def __init__(self, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocabulary: str | None = None  # the tokenizer as the tokenizers library writes it, in JSON
        self._vocab_size = vocab_size
        self._eos_token_ids = [token_id for token_id in eos_token_ids if token_id < vocab_size]
        self._guides: dict[str, _Guide] = {}
        self._num_followers = max(1, min(8, (os.cpu_count() or 1) // 2))
        self._followers = ThreadPoolExecutor(self._num_followers, thread_name_prefix="masks")
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._lock = threading.Lock()
        self._queues: dict[str, deque[_Guide]] = {}  # to be compiled, by tenant; whose turn it is comes first
        self._tokenizer: LLTokenizer | None = None  # this and the next one: the compiler's own
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()  # by tenant and grammar

    def __len__(self) -> int:
        return len(self._guides)

    def begin(self, request_id: str, grammar: str, *, tenant: str = "") -> "Future[None]":
        """Compile a request's grammar, tenants by turns; the future ends when its first mask or its error is there."""
        assert self.vocabulary is not None, "the vocabulary is not known"
        guide = self._guides[request_id] = _Guide(grammar, tenant, self._no_mask())
        with self._lock:
            self._queues.setdefault(tenant, deque()).append(guide)
        self._compiler.submit(self._compile_next, self.vocabulary)
        return guide.work

    def masks(self, request_ids: Sequence[str]) -> tuple[dict[str, Mask], dict[str, RequestFailure]]:
        """The masks of those requests that are guided, and why those of them that cannot go on do not. Waits for the followers."""
        masks, failures = {}, {}
        deadline_s = time.monotonic() + WAIT_S
        for request_id in request_ids:
            guide = self._guides.get(request_id)
            if guide is None:
                continue
            if failure := _failure_of(guide, deadline_s):
                failures[request_id] = failure
                self._compiler.submit(self._drop, guide)
            else:
                masks[request_id] = guide.mask
        return masks, failures

    def advance(self, token_ids: Mapping[str, int]) -> None:
        """Begin to compute the next masks of those requests that are guided, each with its new token read."""
        pairs = [(guide, token_id) for request_id, token_id in token_ids.items() if (guide := self._guides.get(request_id))]
        for guide, _ in pairs:
            guide.work = Future()
        for part in range(min(len(pairs), self._num_followers)):
            self._followers.submit(self._follow_all, pairs[part :: self._num_followers])

    def end(self, request_id: str) -> None:
        """Forget a request; what of its work has not begun is not done."""
        guide = self._guides.pop(request_id, None)
        if guide is None or not guide.work.cancel():
            return
        with self._lock:
            queue = self._queues.get(guide.tenant)
            if queue is not None and guide in queue:
                queue.remove(guide)
                if not queue:
                    del self._queues[guide.tenant]

    def close(self) -> None:
        self._guides.clear()
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self._followers.shutdown(cancel_futures=True)

    def _no_mask(self) -> Mask:
        return np.zeros(-(-self._vocab_size // 32), np.int32)

    def _compile_next(self, vocabulary: str) -> None:
        if guide := self._next_in_turn():
            _settle(guide.work, lambda: self._compile(guide, vocabulary))

    def _next_in_turn(self) -> _Guide | None:
        with self._lock:
            if not self._queues:
                return None
            tenant, queue = next(iter(self._queues.items()))
            guide = queue.popleft()
            del self._queues[tenant]
            if queue:
                self._queues[tenant] = queue  # behind the others
            return guide

    def _compile(self, guide: _Guide, vocabulary: str) -> None:
        try:
            guide.matcher = self._matcher(guide, vocabulary).deep_copy()
        except ValueError as error:
            guide.error = RequestFailure(f"the grammar: this model's tokenizer cannot be used: {error}")
        else:
            self._compute(guide)

    def _matcher(self, guide: _Guide, vocabulary: str) -> LLMatcher:
        """At the grammar's beginning. Raises ValueError where the vocabulary is of an unknown kind."""
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(vocabulary, n_vocab=self._vocab_size, eos_token=self._eos_token_ids or None)
        tokenizer, key = self._tokenizer, (guide.tenant, guide.grammar)
        if key not in self._compiled:
            self._compiled[key] = _on_a_deep_stack(lambda: LLMatcher(tokenizer, guide.grammar, log_level=0, limits=_LIMITS))
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return self._compiled[key]

    def _drop(self, guide: _Guide) -> None:
        """All copies of what was compiled have its lexer's states in common, and a full lexer fails every later copy."""
        self._compiled.pop((guide.tenant, guide.grammar), None)

    def _follow_all(self, pairs: Sequence[tuple[_Guide, int]]) -> None:
        """Each for itself: one that takes long or breaks ends no other."""
        for guide, token_id in pairs:
            _settle(guide.work, partial(self._follow, guide, token_id))

    def _follow(self, guide: _Guide, token_id: int) -> None:
        started_s = time.thread_time()
        assert guide.matcher is not None
        guide.matcher.consume_token(token_id)
        guide.used_s += time.thread_time() - started_s
        self._compute(guide)

    def _compute(self, guide: _Guide) -> None:
        """The mask, without the interpreter's lock, or what is wrong."""
        started_s = time.thread_time()
        assert guide.matcher is not None
        mask = self._no_mask()
        guide.matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        guide.mask = mask
        guide.num_masks += 1
        guide.used_s += time.thread_time() - started_s
        if error := guide.matcher.get_error():
            guide.error = RequestFailure(f"the grammar: {error}", is_refusal=True)
        elif guide.used_s > MAX_MASKS_S + guide.num_masks * MASK_S:
            allowed = f"{MAX_MASKS_S:g} s and {1000 * MASK_S:g} ms for each token"
            guide.error = RequestFailure(f"the grammar: its masks take more processor time than the allowed {allowed}", is_refusal=True)


def _settle(future: "Future[None]", work: Callable[[], None]) -> None:
    """Do the work of a future, unless it was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        work()
    except BaseException as error:  # as an extension's panics are
        future.set_exception(error)
    else:
        future.set_result(None)


def _failure_of(guide: _Guide, deadline_s: float) -> RequestFailure | None:
    try:
        failure = guide.work.exception(max(0.0, deadline_s - time.monotonic()))  # what the library breaks at does not end the engine
    except FutureTimeoutError:
        return RequestFailure(f"the grammar: its mask took longer than {WAIT_S:.0f} s")
    return guide.error if failure is None else RequestFailure(f"the grammar: it cannot be followed: {failure!r}")
