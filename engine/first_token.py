"""Where each request's time goes until its first token: it waits, its pictures are encoded, its prompt is computed.

The stages follow each other without a gap, so they add up to the time from the request's arrival to its first token. Is told what happens,
and knows nothing of how anything is computed.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(slots=True)
class _Marks:
    added_s: float
    begun_s: float | None = None
    encoded_s: float | None = None


class FirstTokenClock:
    """Holds the requests that have no token yet. `now_s`: a clock that never goes back."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._marks: dict[str, _Marks] = {}

    def __len__(self) -> int:
        return len(self._marks)

    def added(self, request_id: str) -> None:
        self._marks[request_id] = _Marks(self._now_s())

    def oldest_waiting_s(self) -> float:
        """Since the arrival of the oldest request that has not begun; 0 without one."""
        return self._since(marks for marks in self._marks.values() if marks.begun_s is None)

    def oldest_s(self, request_ids: Iterable[str]) -> float:
        """Since the arrival of the oldest of these requests, of those that have no token; 0 without one."""
        return self._since(marks for request_id in request_ids if (marks := self._marks.get(request_id)))

    def begun(self, request_id: str) -> None:
        """Its first picture goes to the encoder, or its first chunk is computed; later calls change nothing."""
        marks = self._marks.get(request_id)
        if marks is not None and marks.begun_s is None:
            marks.begun_s = self._now_s()

    def encoded(self, request_id: str) -> None:
        """One of its pictures went through the encoder; the last call counts."""
        marks = self._marks.get(request_id)
        if marks is not None:
            marks.encoded_s = self._now_s()

    def ended(self, request_id: str) -> dict[str, float] | None:
        """Its first token is there, or will never be: seconds of queue, encode and prefill. None the second time.

        Without `encode` where no picture had to be: there are none, or they were seen before.
        """
        marks = self._marks.pop(request_id, None)
        if marks is None:
            return None
        now_s = self._now_s()
        begun_s = now_s if marks.begun_s is None else marks.begun_s
        prefill_from_s = begun_s if marks.encoded_s is None else marks.encoded_s
        encode = {} if marks.encoded_s is None else {"encode": marks.encoded_s - begun_s}
        return {"queue": begun_s - marks.added_s, **encode, "prefill": now_s - prefill_from_s}

    def _since(self, marks: Iterable[_Marks]) -> float:
        now_s = self._now_s()
        return max((now_s - each.added_s for each in marks), default=0.0)
