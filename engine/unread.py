"""Outputs that came from the engine and that nobody has read yet: a queue per request, bounded alone and together.

A reader who stops costs no more memory than that: its request is given up, what it has not read stays for it. Estimates sizes, in bytes of
the objects as Python keeps them. Knows nothing of sockets.
"""

import asyncio

from engine.request import EngineError, StepOutput, TokenLogprobs, UnreadError

MAX_UNREAD_BYTES = 4 << 20  # per request: some 16,000 tokens, or 1,600 with twenty log-probabilities each
MAX_UNREAD_BYTES_TOGETHER = 256 << 20

_OUTPUT_BYTES = 256  # a StepOutput with one token and its request's id
_LOGPROB_BYTES = 200
_TOP_BYTES = 116  # a pair in `TokenLogprobs.top`
_NUMBER_BYTES = 32


class UnreadOutputs:
    """The queues of all requests that run. One event loop owns it."""

    def __init__(self, *, limit_bytes: int = MAX_UNREAD_BYTES, limit_bytes_together: int = MAX_UNREAD_BYTES_TOGETHER) -> None:
        self.limit_bytes = limit_bytes
        self.limit_bytes_together = limit_bytes_together
        self.num_bytes = 0
        self._queues: dict[str, OutputQueue] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._queues

    def __len__(self) -> int:
        return len(self._queues)

    def open(self, request_id: str) -> "OutputQueue":
        assert request_id not in self._queues, f"{request_id} is open"
        queue = self._queues[request_id] = OutputQueue(self)
        return queue

    def close(self, request_id: str) -> None:
        """Forget a request; what comes for it later is dropped."""
        queue = self._queues.pop(request_id)
        self.num_bytes -= queue.num_bytes

    def put(self, output: StepOutput) -> bool:
        """False: the request is given up for its reader's sake, and the engine should hear of it."""
        queue = self._queues.get(output.request_id)
        if queue is None or queue.is_ended:
            return True
        if output.finish_reason is None and self._is_full(queue):
            queue.end(UnreadError(f"the answer was given up: {queue.num_bytes >> 10} KiB of it were written and not read"))
            return False
        queue.put(output)
        return True

    def fail(self, request_id: str, error: EngineError) -> None:
        if queue := self._queues.get(request_id):
            queue.end(error)

    def fail_all(self, error: EngineError) -> None:
        for queue in self._queues.values():
            queue.end(error)

    def _is_full(self, queue: "OutputQueue") -> bool:
        """Together too much: then of those that have more than their share, the one that is to grow."""
        if queue.num_bytes > self.limit_bytes:
            return True
        return self.num_bytes > self.limit_bytes_together and queue.num_bytes > self.limit_bytes_together // len(self._queues)


class OutputQueue:
    """One request's outputs, in order, and at last its error where it has one."""

    def __init__(self, together: UnreadOutputs) -> None:
        self.num_bytes = 0
        self.is_ended = False  # nothing is taken any more
        self._together = together
        self._items: asyncio.Queue[StepOutput | EngineError] = asyncio.Queue()

    def put(self, output: StepOutput) -> None:
        self._count(size_of(output))
        self._items.put_nowait(output)

    def end(self, error: EngineError) -> None:
        if not self.is_ended:
            self.is_ended = True
            self._items.put_nowait(error)

    async def get(self) -> StepOutput:
        """The next output. Raises the error that ended the request."""
        item = await self._items.get()
        if isinstance(item, EngineError):
            raise item
        self._count(-size_of(item))
        return item

    def _count(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._together.num_bytes += num_bytes


def size_of(output: StepOutput) -> int:
    """About how many bytes it takes."""
    scored = (*(output.logprobs or ()), *(output.prompt_logprobs or ()))
    return _OUTPUT_BYTES + _NUMBER_BYTES * (len(output.token_ids) + len(output.embedding or ())) + sum(map(_size_of_token, scored))


def _size_of_token(logprobs: TokenLogprobs) -> int:
    return _LOGPROB_BYTES + _TOP_BYTES * len(logprobs.top)
