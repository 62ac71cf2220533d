"""How long the stages of one request took, and the standard header `Server-Timing` that tells the client.

A header, since it needs no field of a request, reaches streams before their first piece, and is shown by every browser's own tools.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping


class StageTimings:
    """Seconds by stage, in the order in which the stages ended. Stages may lie within others: `picture-…` within `pictures`.

    now_s: a clock that never goes back.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self.seconds: dict[str, float] = {}
        self._now_s = now_s

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started_s = self._now_s()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now_s() - started_s

    def add_slowest(self, name: str, stages_s: Mapping[str, float]) -> None:
        """One of several things done side by side: each of its stages counts as `name-stage` where it is the slowest."""
        for stage, seconds in stages_s.items():
            key = f"{name}-{stage}"
            self.seconds[key] = max(self.seconds.get(key, 0.0), seconds)

    def header(self) -> str:
        """`name;dur=…, …` with milliseconds; empty without stages."""
        return ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in self.seconds.items())
