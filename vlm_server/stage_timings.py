"""How long the stages of one request took, and what its client is told: the header `Server-Timing`, and on request the field `timings`.

A header, since it needs no field of a request, reaches streams before their first piece, and is shown by every browser's own tools. The
field is for those who asked with `return_timings`; it also knows what came after the headers. Knows nothing of routes or of metrics.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

PICTURE = "picture"  # stages within the stage `pictures` are called picture-fetch, picture-decode …


class StageObserver(Protocol):
    """Is told of every stage while it happens."""

    def stage_began(self, name: str) -> None: ...

    def stage_ended(self, name: str, seconds: float) -> None: ...

    def stages_measured(self, stages_s: Mapping[str, float]) -> None:
        """Stages whose beginning nobody was told of."""


class _Nobody:
    def stage_began(self, name: str) -> None:
        pass

    def stage_ended(self, name: str, seconds: float) -> None:
        pass

    def stages_measured(self, stages_s: Mapping[str, float]) -> None:
        pass


@dataclass(frozen=True, slots=True)
class StageSpan:
    """When a stage was, in seconds on the request's clock."""

    name: str
    began_s: float
    ended_s: float


Report = Callable[[], dict[str, Any]]


def no_report() -> dict[str, Any]:
    """Of a request that did not ask for its timings."""
    return {}


class StageTimings:
    """Seconds by stage, in the order in which the stages ended. Stages may lie within others: `picture-…` within `pictures`.

    now_s: a clock that never goes back. observer: beside the request's own record, e.g. for metrics.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic, *, observer: StageObserver | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.spans: dict[str, StageSpan] = {}  # a stage that came several times from its first beginning to its last end
        self.pictures: list[dict[str, float]] = []  # each one's own stages, in the request's order
        self.first_token_s: float | None = None  # from the request's arrival to the first piece of an answer
        self._observer: StageObserver = observer or _Nobody()
        self._now_s = now_s
        self.began_s = now_s()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began_s = self._now_s()
        self._observer.stage_began(name)
        try:
            yield
        finally:
            ended_s = self._now_s()
            self._observer.stage_ended(name, ended_s - began_s)
            self.seconds[name] = self.seconds.get(name, 0.0) + ended_s - began_s
            first_s = self.spans[name].began_s if name in self.spans else began_s
            self.spans[name] = StageSpan(name, first_s, ended_s)

    def add_slowest(self, name: str, stages_s: Mapping[str, float]) -> None:
        """One of several things done side by side: each of its stages counts as `name-stage` where it is the slowest."""
        for stage, seconds in stages_s.items():
            key = f"{name}-{stage}"
            self.seconds[key] = max(self.seconds.get(key, 0.0), seconds)
        if name == PICTURE:
            self.pictures.append(dict(stages_s))

    def add_until(self, ended_s: float, stages_s: Mapping[str, float]) -> None:
        """Stages that somebody else measured: they followed each other without a gap, the last one until `ended_s` on our clock."""
        self.seconds.update(stages_s)
        began_s = ended_s - sum(stages_s.values())
        for name, seconds in stages_s.items():
            self.spans[name] = StageSpan(name, began_s, began_s + seconds)
            began_s += seconds

    def first_token(self, at_s: float) -> None:
        """The first piece of an answer was there at `at_s` on our clock; later calls change nothing."""
        if self.first_token_s is None:
            self.first_token_s = at_s - self.began_s
            self._observer.stages_measured({"first-token": self.first_token_s})

    def header(self) -> str:
        """`name;dur=…, …` with milliseconds; empty without stages."""
        return ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in self.seconds.items())

    def report(self) -> dict[str, Any]:
        """`{"timings": {"template_ms": …, …}}`: milliseconds, by stage, of each picture, and until now."""
        stages = {f"{name}_ms": _ms(seconds) for name, seconds in self.seconds.items() if not name.startswith(f"{PICTURE}-")}
        first = {} if self.first_token_s is None else {"first_token_ms": _ms(self.first_token_s)}
        pictures = [{f"{name}_ms": _ms(seconds) for name, seconds in stages_s.items()} for stages_s in self.pictures]
        per_picture = {"per_picture": pictures} if pictures else {}
        return {"timings": {**stages, **first, "total_ms": _ms(self._now_s() - self.began_s), **per_picture}}

    def report_if(self, is_wanted: bool | None) -> Report:
        """`report`, for a request that asked for it."""
        return self.report if is_wanted else no_report


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
