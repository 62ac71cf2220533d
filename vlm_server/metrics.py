"""What `GET /metrics` shows: the server's own counters and histograms, and the engine's and the vision package's numbers.

One registry per app. The engine's and the vision package's numbers are read when the page is, nothing is counted twice. Labels come from
sets that are bounded: routes as they are declared, stages, codes of errors, names of keys.
"""

from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from engine.request import EngineStats
from vision.budget import BudgetStats
from vision.service import STAGE_BOUNDS_S, VisionStats

_MAX_CODES = 200  # of errors, as labels

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_STAGE_BUCKETS_S = (0.001, 0.0025, *_LATENCY_BUCKETS_S)
_LAG_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

# EngineStats field → (metric, help)
_ENGINE_GAUGES = {
    "num_waiting": ("num_requests_waiting", "Requests that hold no blocks."),
    "num_running": ("num_requests_running", "Requests that hold blocks."),
    "num_blocks": ("num_blocks", "KV blocks in all."),
    "num_free_blocks": ("num_free_blocks", "KV blocks that hold nothing."),
    "num_cached_blocks": ("num_cached_blocks", "KV blocks that hold a prefix which no request uses now."),
    "num_referenced_blocks": ("num_referenced_blocks", "KV blocks that requests use."),
    "num_batched_requests": ("batch_size", "Requests in the last step."),
    "max_batched_requests": ("max_batch_size", "Requests in the largest step so far."),
    "num_images_waiting": ("num_images_waiting", "Pictures that wait for the encoder."),
    "oldest_waiting_s": ("oldest_waiting_request_age_seconds", "How long the oldest request that has not begun is waiting in the engine."),
    "oldest_image_waiting_s": ("oldest_waiting_image_age_seconds", "How long the oldest picture is waiting for the encoder."),
    "embedding_cache_bytes": ("embedding_cache_bytes", "Memory of the picture embeddings that are kept."),
}
_ENGINE_COUNTERS = {
    "num_steps": ("engine_steps", "Steps of the engine."),
    "num_prompt_tokens": ("prompt_tokens", "Prompt tokens, those of pictures too."),
    "num_cached_prompt_tokens": ("prefix_cache_hit_tokens", "Prompt tokens whose KV was in the prefix cache."),
    "num_output_tokens": ("generation_tokens", "New tokens."),
    "num_preemptions": ("preemptions", "Requests that gave their blocks back for a while."),
    "num_images_encoded": ("images_encoded", "Pictures that went through the encoder."),
    "num_embedding_cache_hits": ("embedding_cache_hits", "Pictures whose embedding was kept from before."),
    "num_embedding_cache_misses": ("embedding_cache_misses", "Pictures whose embedding was not, when their request came."),
    "step_time_s": ("engine_step_seconds", "Time in steps."),
    "overhead_time_s": ("engine_overhead_seconds", "Time in steps outside tensor work."),
    "encode_time_s": ("encode_seconds", "Time in the vision encoder."),
}
_VISION_COUNTERS = {
    "num_pictures": ("pictures", "Pictures that requests asked for."),
    "num_cache_hits": ("processed_cache_hits", "Pictures that were processed before and kept."),
    "num_cache_misses": ("processed_cache_misses", "Pictures that were not."),
    "num_http_fresh": ("http_cache_hits", "Downloads that were not needed: the last one may still be used."),
    "num_http_revalidated": ("http_cache_revalidations", "Downloads answered with 304: the picture is what it was."),
    "num_http_misses": ("http_cache_misses", "Downloads of a whole picture."),
}
_VISION_GAUGES = {
    "cache_bytes": ("processed_cache_bytes", "Memory of the processed pictures that are kept."),
    "http_cache_bytes": ("http_cache_bytes", "Memory of the downloaded pictures that are kept."),
    "oldest_in_flight_s": ("oldest_picture_age_seconds", "How long the oldest picture is in its stage: fetched, decoded or preprocessed."),
}

_VISION_STAGES = {
    "num_done": ("pictures_done", "Pictures through the stage, failed ones too."),
    "time_s": ("picture_stage_seconds", "Time in the stage."),
}


# BudgetStats field → (metric, help)
_BUDGET_GAUGES = {
    "used": ("budget_used", "What requests hold of the budget."),
    "limit": ("budget_limit", "What they may hold together."),
    "num_waiting": ("budget_waiting", "Requests, or parts of them, that wait for some of it."),
}


class Metrics:
    """One app's numbers."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._backend = _BackendCollector()
        self._registry.register(self._backend)
        self._requests = Counter("vlm:http_requests", "HTTP requests answered.", ["route", "status"], registry=self._registry)
        self._active = Gauge("vlm:http_requests_active", "HTTP requests being answered.", registry=self._registry)
        self._duration = Histogram(
            "vlm:http_request_duration_seconds", "From the request to the last byte.", buckets=_LATENCY_BUCKETS_S, registry=self._registry
        )
        self._first_token = Histogram(
            "vlm:time_to_first_token_seconds",
            "From the submission of the prompt to the first text.",
            buckets=_LATENCY_BUCKETS_S,
            registry=self._registry,
        )
        self._inter_token = Histogram(
            "vlm:inter_token_latency_seconds", "Between two pieces of one answer.", buckets=_TOKEN_BUCKETS_S, registry=self._registry
        )
        self._refusals = Counter(
            "vlm:quota_refusals", "Requests refused because the key's quota was used up.", ["key", "kind"], registry=self._registry
        )
        self._lag = Histogram(
            "vlm:event_loop_lag_seconds", "How late the event loop ran what was due.", buckets=_LAG_BUCKETS_S, registry=self._registry
        )
        self._preparation = Histogram(
            "vlm:prompt_preparation_seconds", "Template, pictures and tokenizer.", buckets=_LATENCY_BUCKETS_S, registry=self._registry
        )
        self._stages = Histogram(
            "vlm:request_stage_seconds",
            "A request's time in a stage; first-token: from its arrival to its first piece.",
            ["stage"],
            buckets=_STAGE_BUCKETS_S,
            registry=self._registry,
        )
        self._in_stage = Gauge("vlm:requests_in_stage", "Requests in a stage before the engine's.", ["stage"], registry=self._registry)
        self._errors = Counter(
            "vlm:request_errors",
            "Requests that were refused or failed, by the error's code; status 200: a stream that had begun.",
            ["code", "status"],
            registry=self._registry,
        )
        self._codes: set[str] = set()

    def request_started(self) -> None:
        self._active.inc()

    def request_ended(self, route: str, status: int, duration_s: float, code: str | None = None) -> None:
        """code: of the error that it ended with."""
        self._active.dec()
        self._requests.labels(route, status).inc()
        self._duration.observe(duration_s)
        if code is not None:
            self._errors.labels(self._known_code(code), status).inc()

    def stage_began(self, name: str) -> None:
        self._in_stage.labels(name).inc()

    def stage_ended(self, name: str, seconds: float) -> None:
        self._in_stage.labels(name).dec()
        self._stages.labels(name).observe(seconds)

    def stages_measured(self, stages_s: Mapping[str, float]) -> None:
        """Stages that somebody else measured: the engine's of one answer."""
        for name, seconds in stages_s.items():
            self._stages.labels(name).observe(seconds)

    def loop_lagged(self, lag_s: float) -> None:
        self._lag.observe(lag_s)

    def prompt_prepared(self, duration_s: float) -> None:
        self._preparation.observe(duration_s)

    def quota_refused(self, key_name: str, kind: str) -> None:
        self._refusals.labels(key_name, kind).inc()

    def first_token(self, latency_s: float) -> None:
        self._first_token.observe(latency_s)

    def next_token(self, latency_s: float) -> None:
        self._inter_token.observe(latency_s)

    def page(
        self, engine: EngineStats | None, vision: VisionStats, *, num_restarts: int, num_sessions: int | None, num_turns: int
    ) -> bytes:
        """The Prometheus text. `engine` is None while the engine does not answer, `num_sessions` while their store does not."""
        self._backend.engine, self._backend.vision, self._backend.num_restarts = engine, vision, num_restarts
        self._backend.num_sessions, self._backend.num_turns = num_sessions, num_turns
        return generate_latest(self._registry)

    def _known_code(self, code: str) -> str:
        """Codes are words of ours. Should one ever hold what a client sent, the page does not grow without end."""
        if len(self._codes) < _MAX_CODES:
            self._codes.add(code)
        return code if code in self._codes else "other"


class _BackendCollector:
    """Turns the latest stats into metric families."""

    def __init__(self) -> None:
        self.engine: EngineStats | None = None
        self.vision = VisionStats()
        self.num_restarts = 0
        self.num_sessions: int | None = None
        self.num_turns = 0

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("vlm:engine_up", "1 while the engine answers.", value=float(self.engine is not None))
        yield up
        yield CounterMetricFamily("vlm:engine_restarts", "Times that the engine process was started again.", value=self.num_restarts)
        yield GaugeMetricFamily("vlm:session_turns_active", "Turns of interactive sessions under way.", value=self.num_turns)
        if self.num_sessions is not None:
            yield GaugeMetricFamily("vlm:sessions", "Sessions in the store, those of other servers too.", value=self.num_sessions)
        if self.engine is not None:
            yield from _families(self.engine, _ENGINE_GAUGES, GaugeMetricFamily)
            yield from _families(self.engine, _ENGINE_COUNTERS, CounterMetricFamily)
        yield from _families(self.vision, _VISION_COUNTERS, CounterMetricFamily)
        yield from _families(self.vision, _VISION_GAUGES, GaugeMetricFamily)
        for field, (name, text) in _VISION_STAGES.items():
            yield _labelled(CounterMetricFamily(f"vlm:{name}", text, labels=["stage"]), getattr(self.vision, field))
        yield _stage_histogram(self.vision)
        in_flight = GaugeMetricFamily("vlm:pictures_in_flight", "Pictures in the stage.", labels=["stage"])
        yield _labelled(in_flight, self.vision.num_in_flight)
        yield _labelled(CounterMetricFamily("vlm:pictures_failed", "Pictures refused.", labels=["code"]), self.vision.num_failed)
        yield from _budget_families(self.vision.budgets)


def _stage_histogram(stats: VisionStats) -> Metric:
    """Of pictures, failed ones too."""
    family = HistogramMetricFamily("vlm:picture_stage_duration_seconds", "A picture's time in a stage.", labels=["stage"])
    bounds = [*map(str, STAGE_BOUNDS_S), "+Inf"]
    for stage, counts in stats.durations.items():
        family.add_metric([stage], list(zip(bounds, accumulate(counts), strict=True)), stats.time_s[stage])
    return family


_Family = type[GaugeMetricFamily] | type[CounterMetricFamily]


def _families(stats: object, table: Mapping[str, tuple[str, str]], family: _Family) -> Iterator[Metric]:
    for field, (name, text) in table.items():
        yield family(f"vlm:{name}", text, value=getattr(stats, field))


def _budget_families(budgets: Mapping[str, BudgetStats]) -> Iterator[Metric]:
    for field, (name, text) in _BUDGET_GAUGES.items():
        gauge = GaugeMetricFamily(f"vlm:{name}", text, labels=["budget"])
        yield _labelled(gauge, {budget: getattr(stats, field) for budget, stats in budgets.items()})
    refusals = CounterMetricFamily("vlm:budget_refusals", "Waits for the budget that ended in a refusal.", labels=["budget"])
    yield _labelled(refusals, {budget: stats.num_refused for budget, stats in budgets.items()})


def _labelled(family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, float]) -> Metric:
    for label, value in values.items():
        family.add_metric([label], value)
    return family
