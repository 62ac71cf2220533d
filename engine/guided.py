"""Grammars as token masks: which tokens may come next in each guided request, computed beside the model's work.

A grammar is a text in llguidance's own form; `vlm_server.guided` writes it. One thread compiles, so that a large grammar holds up nobody
else; another follows all live ones: while the model computes a step, it reads the last tokens and has the next masks ready.
Knows nothing of tensors, of requests' lives or of HTTP.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from engine.request import InvalidRequestError

MAX_GRAMMAR_BYTES = 1 << 18
MAX_COMPILED = 8  # grammars that are kept for the next request with the same
STACK_BYTES = 512 << 20  # of address space: the library recurses into rules, 4 to 8 KiB for each; MAX_GRAMMAR_BYTES hold 36,000
WAIT_S = 20.0  # for one step's masks; llguidance's own limits end them within a fraction of a second

# A hostile grammar fills memory with the lexer's states (1 to 2 KiB each) and takes seconds with its symbols (20,000 are 4,000 properties).
_LIMITS = LLParserLimits(max_lexer_states=50_000, max_grammar_size=20_000, verbose_errors=False)

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


@dataclass(slots=True)
class _Guide:
    """One request's place in its grammar."""

    mask: Mask
    matcher: LLMatcher | None = None
    error: str = ""
    work: "Future[None]" = field(default_factory=Future)  # done: mask or error is that of the next token


class Guides:
    """The grammars of an engine's live requests. One thread owns it; `close()` ends the threads that work for it."""

    def __init__(self, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocabulary: str | None = None  # the tokenizer as the tokenizers library writes it, in JSON
        self._vocab_size = vocab_size
        self._eos_token_ids = [token_id for token_id in eos_token_ids if token_id < vocab_size]
        self._guides: dict[str, _Guide] = {}
        self._follower = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._tokenizer: LLTokenizer | None = None  # this and the next one: the compiler's own
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._executor = LLExecutor(num_threads=max(1, min(8, (os.cpu_count() or 1) // 2)))

    def __len__(self) -> int:
        return len(self._guides)

    def begin(self, request_id: str, grammar: str) -> "Future[None]":
        """Compile a request's grammar; the future ends when its first mask or its error is there."""
        assert self.vocabulary is not None, "the vocabulary is not known"
        guide = self._guides[request_id] = _Guide(np.zeros(-(-self._vocab_size // 32), np.int32))
        guide.work = self._compiler.submit(self._compile, guide, grammar, self.vocabulary)
        return guide.work

    def masks(self, request_ids: Sequence[str]) -> tuple[dict[str, Mask], dict[str, str]]:
        """The masks of those requests that are guided, and the errors of those of them that cannot go on. Waits for the follower."""
        masks, errors = {}, {}
        for request_id in request_ids:
            guide = self._guides.get(request_id)
            if guide is not None:
                if error := _error_of(guide):
                    errors[request_id] = f"the grammar: {error}"
                else:
                    masks[request_id] = guide.mask
        return masks, errors

    def advance(self, token_ids: Mapping[str, int]) -> None:
        """Begin to compute the next masks of those requests that are guided, each with its new token read."""
        pairs = [(guide, token_id) for request_id, token_id in token_ids.items() if (guide := self._guides.get(request_id))]
        if pairs:
            work = self._follower.submit(self._follow, pairs)
            for guide, _ in pairs:
                guide.work = work

    def end(self, request_id: str) -> None:
        self._guides.pop(request_id, None)

    def close(self) -> None:
        self._guides.clear()
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self._follower.shutdown(cancel_futures=True)

    def _compile(self, guide: _Guide, grammar: str, vocabulary: str) -> None:
        try:
            guide.matcher = self._matcher(grammar, vocabulary).deep_copy()
        except ValueError as error:
            guide.error = f"this model's tokenizer cannot be used: {error}"
        else:
            self._compute([guide])

    def _matcher(self, grammar: str, vocabulary: str) -> LLMatcher:
        """At the grammar's beginning. Raises ValueError where the vocabulary is of an unknown kind."""
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(vocabulary, n_vocab=self._vocab_size, eos_token=self._eos_token_ids or None)
        tokenizer = self._tokenizer
        if grammar not in self._compiled:
            self._compiled[grammar] = _on_a_deep_stack(lambda: LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS))
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return self._compiled[grammar]

    def _follow(self, pairs: Sequence[tuple[_Guide, int]]) -> None:
        for guide, token_id in pairs:
            assert guide.matcher is not None
            guide.matcher.consume_token(token_id)
        self._compute([guide for guide, _ in pairs])

    def _compute(self, guides: Sequence[_Guide]) -> None:
        """All masks at once, over the executor's threads and without the interpreter's lock."""
        masks = np.zeros((len(guides), len(guides[0].mask)), np.int32)
        matchers = [(guide.matcher, row) for row, guide in enumerate(guides) if guide.matcher]
        self._executor.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, masks.strides[0], len(guides))
        for guide, mask in zip(guides, masks, strict=True):
            assert guide.matcher is not None
            guide.mask = mask
            guide.error = guide.matcher.get_error()


def _error_of(guide: _Guide) -> str:
    try:
        failure = guide.work.exception(WAIT_S)  # not `result`: what the library breaks at ends requests, not the engine
    except FutureTimeoutError:
        return f"its mask took longer than {WAIT_S:.0f} s"
    return guide.error if failure is None else f"it cannot be followed: {failure!r}"
