"""The words that all of the engine shares: prompts, sampling parameters, requests, one step's plan and its results.

Plain data without tensors. Knows nothing of HTTP, of text or of how anything is computed.
"""

import enum
import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from vision.shared_array import SharedArray


class EngineError(Exception):
    """Base of all that the engine refuses or fails at."""


class InvalidRequestError(EngineError):
    """The request can never be served as it is; the message says why and what is allowed."""


class PromptTooLongError(InvalidRequestError):
    def __init__(self, num_tokens: int, session_len: int) -> None:
        super().__init__(f"the prompt has {num_tokens} tokens; with at least one new token at most {session_len} fit (--session-len)")
        self.num_tokens = num_tokens
        self.session_len = session_len


class QueueFullError(EngineError):
    """Too many requests wait; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnreadError(EngineError):
    """Too much of the answer was written and not read; it ends here."""


class EngineDeadError(EngineError):
    """The engine process ended or does not answer; it is being restarted unless `is_final`."""

    def __init__(self, message: str, *, is_final: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final


class FinishReason(enum.StrEnum):
    STOP = "stop"  # an end token or a stop token id
    LENGTH = "length"  # max_tokens or the window
    ABORT = "abort"  # the client asked
    ERROR = "error"  # `StepOutput.error` says what


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one row's next token is chosen. Order: penalties, bias, minimum length, grammar, temperature, top_k, top_p, min_p."""

    max_tokens: int | None = None  # new tokens; None: as many as fit the window; 0: the prompt is only read
    min_tokens: int = 0  # before these, end and stop tokens cannot be chosen
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, as transformers
    presence_penalty: float = 0.0  # over the output, as OpenAI
    frequency_penalty: float = 0.0  # over the output, as OpenAI
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None  # None: drawn when the request is added
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False  # end tokens cannot be chosen
    num_beams: int = 1  # above 1: beam search, sampled where the temperature is above 0
    logprobs: int | None = None  # None: none; k: of the chosen token and of the k best
    prompt_logprobs: int | None = None  # as `logprobs`, of each prompt token but the first
    pools: bool = False  # wants the mean of the prompt's last hidden states
    grammar: str | None = None  # the output follows it, see `engine.guided`; None: any output

    def __post_init__(self) -> None:
        for name, is_valid, allowed in (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 0, "at least 0"),
            ("min_tokens", self.min_tokens >= 0, "at least 0"),
            ("temperature", 0 <= self.temperature <= 2, "between 0 and 2"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            ("logit_bias", all(-100 <= bias <= 100 for bias in self.logit_bias.values()), "values between -100 and 100"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "between 0 and 20"),
            ("prompt_logprobs", self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20, "between 0 and 20"),
        ):
            if not is_valid:
                raise InvalidRequestError(f"{name}: {getattr(self, name)} is not allowed, only {allowed}")

    @property
    def reads_prompt(self) -> bool:
        """Whether all of the prompt must be computed, though the prefix cache has some of it."""
        return self.pools or self.prompt_logprobs is not None


@dataclass(frozen=True, slots=True, weakref_slot=True)
class ImageInput:
    """One picture as the vision encoder takes it."""

    content_hash: bytes  # of the picture's bytes, of all that changes its pixels or its tokens, and of who may share its embedding
    num_tokens: int  # rows of its embedding
    arrays: dict[str, SharedArray]  # the family's encoder inputs by name, e.g. pixel_values: (num_tiles, 3, height, width) uint8

    @property
    def is_open(self) -> bool:
        """Whether all of its arrays are there."""
        return all(array.fd >= 0 for array in self.arrays.values())

    def close(self) -> None:
        for shared in self.arrays.values():
            shared.close()


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """A run of prompt slots that takes rows `offset … offset + num_tokens` of an image's embedding."""

    start: int  # first slot in the prompt
    num_tokens: int
    image: int  # index into Prompt.images
    offset: int = 0
    is_atomic: bool = False  # attends to itself in both directions: one prefill chunk holds all of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the decoder reads. All lists have one entry per slot."""

    token_ids: tuple[int, ...]
    cache_keys: tuple[int, ...]  # equal keys up to a slot mean equal KV there; see `make_cache_keys`
    images: tuple[ImageInput, ...] = ()
    spans: tuple[ImageSpan, ...] = ()  # in prompt order, disjoint
    positions: tuple[tuple[int, ...], ...] | None = None  # (3, num_tokens) for three-axis rotary models; None: 0, 1, 2, …
    position_delta: int = 0  # position of slot i beyond the prompt is i + position_delta, on every axis
    tenant: str = ""  # whose request it is: tenants take turns. What they share is for keys and hashes to say
    is_probe: bool = False  # the server's own: leaves nothing in the caches and is not counted as work

    def close(self) -> None:
        """Give the pictures' memory back, of which the engine has its own handles."""
        for image in self.images:
            image.close()


def make_cache_keys(
    token_ids: Sequence[int], images: Sequence[ImageInput], spans: Sequence[ImageSpan], *, salt: str = ""
) -> tuple[int, ...]:
    """Token ids, with every image slot replaced by an integer drawn from the image's content hash and the row, and the first slot salted.

    Two prompts share KV blocks exactly as far as their keys agree, so different pictures under equal text never do.
    """
    keys = list(token_ids)
    for span in spans:
        content_hash = images[span.image].content_hash
        for row in range(span.num_tokens):
            keys[span.start + row] = _hashed_key(content_hash, span.offset + row)
    if salt and keys:
        keys[0] = _hashed_key(salt.encode(), keys[0])
    return tuple(keys)


def _hashed_key(data: bytes, number: int) -> int:
    """A negative 63-bit integer: never equal to a token id."""
    digest = hashlib.blake2b(number.to_bytes(8, "little", signed=True), key=hashlib.blake2b(data, digest_size=32).digest(), digest_size=8)
    return -1 - (int.from_bytes(digest.digest(), "little") >> 1)


class RequestStatus(enum.StrEnum):
    WAITING = "waiting"  # holds no blocks
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One sequence on its way through the engine. The scheduler alone changes it."""

    request_id: str
    prompt: Prompt
    params: SamplingParams
    status: RequestStatus = RequestStatus.WAITING
    token_ids: list[int] = field(default_factory=list)  # prompt and output
    cache_keys: list[int] = field(default_factory=list)  # as token_ids
    num_computed: int = 0  # slots whose KV is in the cache
    num_cached: int = 0  # prompt slots that the prefix cache gave at the first admission
    block_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0
    output_counts: dict[int, int] = field(default_factory=dict)  # token id → times in the output, for penalties
    distinct_prompt_ids: "array[int]" = field(default_factory=lambda: array("q"))  # each once, where a repetition penalty reads them

    def __post_init__(self) -> None:
        if self.params.repetition_penalty != 1 and not self.distinct_prompt_ids:
            self.distinct_prompt_ids = array("q", set(self.prompt.token_ids))
        if not self.token_ids:
            self.token_ids = list(self.prompt.token_ids)
            self.cache_keys = list(self.prompt.cache_keys)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt.token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt.token_ids) :]


@dataclass(frozen=True, slots=True)
class ImagePiece:
    """Rows of one image's embedding that overwrite rows of a chunk."""

    content_hash: bytes
    row: int  # first row in the chunk
    offset: int  # first row of the embedding
    num_tokens: int
    is_atomic: bool = False


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one request computes in one step: slots `start … start + len(token_ids)`, one slot when it decodes."""

    request_id: str
    token_ids: list[int]
    start: int
    block_ids: list[int]  # covers start + len(token_ids) slots
    positions: tuple[list[int], ...] | None = None  # (3, len(token_ids)); None: start, start + 1, …
    image_pieces: tuple[ImagePiece, ...] = ()
    samples: bool = True  # False: more of the prompt follows, or no token is wanted
    pools: bool = False  # sum its last hidden states
    next_token_ids: tuple[int, ...] | None = None  # score these, each by the row before it: of the first rows of the chunk
    num_top: int = 0  # with next_token_ids: so many of the likeliest tokens beside each


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. Exactly this reaches every tensor-parallel rank."""

    chunks: tuple[Chunk, ...] = ()
    block_copies: tuple[tuple[int, int], ...] = ()  # (from, to), before anything else: a forked block that is written to

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own distribution, before penalties and temperature."""

    token_id: int
    logprob: float
    rank: int  # 1 = most likely
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """Why a request cannot go on. is_refusal: for what it asks, which is more than is allowed; else the engine failed at it."""

    message: str
    is_refusal: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What one step gave one request. The last one of a request, and no other, has a finish_reason."""

    request_id: str
    token_ids: list[int] = field(default_factory=list)  # new; an end or stop token is the last one
    logprobs: list[TokenLogprobs] | None = None  # one per new token
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # on the first output of a request that wants them, of all tokens but the first
    embedding: list[float] | None = None  # on the last output of a request that pools: (hidden_size,)
    error: str | None = None  # with FinishReason.ERROR
    is_refusal: bool = False  # with an error: it is what the request asks for, see `RequestFailure`
    num_cached_tokens: int = 0  # prompt slots that came from the prefix cache
    timings_s: dict[str, float] | None = None  # a request's first: seconds of queue, encode (if a picture had to be) and prefill


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What the engine settled on when it was ready."""

    model_type: str
    device: str
    dtype: str
    tp: int
    session_len: int
    block_size: int
    num_blocks: int
    vocab_size: int
    hidden_size: int
    eos_token_ids: tuple[int, ...]
    load_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Gauges of this moment and counters since the start."""

    num_waiting: int = 0
    num_running: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0  # holding nothing
    num_cached_blocks: int = 0  # holding a prefix that no request uses now
    num_referenced_blocks: int = 0
    num_steps: int = 0
    num_batched_requests: int = 0  # in the last step
    max_batched_requests: int = 0  # in any step
    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_images_waiting: int = 0
    num_images_encoded: int = 0
    num_embedding_cache_hits: int = 0
    num_embedding_cache_misses: int = 0
    embedding_cache_bytes: int = 0
    step_time_s: float = 0.0  # sum
    overhead_time_s: float = 0.0  # sum of the steps' time outside tensor work
    encode_time_s: float = 0.0  # sum
    oldest_waiting_s: float = 0.0  # since the arrival of the oldest request that has not begun; 0 without one
    oldest_image_waiting_s: float = 0.0  # the same of the oldest one that waits for a picture to be encoded
