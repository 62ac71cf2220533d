"""OpenTelemetry: a span for each request, with a span for each of its stages, sent to a collector over OTLP/HTTP.

The spans are made when a request has ended, out of the times that `StageTimings` kept: nothing on a request's way knows of traces. Sending
happens in a thread of the SDK, from a bounded queue; a collector that does not answer costs spans, never requests. The caller's
`traceparent` is continued, and is not passed on to the hosts of pictures. No prompt, address, picture or key is in a span.
"""

import threading
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from vlm_server import __version__
from vlm_server.stage_timings import PICTURE, StageTimings

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

MAX_PICTURES = 32  # of a request, with spans of their own
MAX_STATE_CHARACTERS = 2048  # of traceparent and tracestate
FLUSH_LIMIT_S = 3.0  # for spans that are not sent yet, when the server ends
EXPORT_LIMIT_S = 5  # for one batch

_PATH = "/v1/traces"  # where collectors take traces
# What the request's facts are called by OpenTelemetry's conventions for servers and for generative models.
_ATTRIBUTES = {
    "id": "vlm.request.id",
    "key": "vlm.key.name",
    "pictures": "vlm.pictures",
    "cached_tokens": "vlm.usage.cached_tokens",
    "image_tokens": "vlm.usage.image_tokens",
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "error": "error.type",
}

OpenExporter = Callable[[], "SpanExporter"]


def check_installed() -> None:
    """Raises ValueError where the packages are missing."""
    if any(_is_missing(name) for name in ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")):
        raise ValueError("otlp_endpoint: OpenTelemetry is not installed: pip install 'vlm-server[tracing]'")


def otlp_exporter(endpoint: str) -> OpenExporter:
    """To a collector at `http://host:port`, or at an address that has a path of its own. Headers come from OTEL_EXPORTER_OTLP_HEADERS."""
    url = endpoint.rstrip("/") + _PATH if urlsplit(endpoint).path in ("", "/") else endpoint

    def open_exporter() -> "SpanExporter":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(url, timeout=EXPORT_LIMIT_S)

    return open_exporter


class Tracing:
    """All traces of one server. Between `open` and `close` each request gets a span; before and after them none."""

    def __init__(self, open_exporter: OpenExporter) -> None:
        self._open_exporter = open_exporter
        self._provider: TracerProvider | None = None
        self._tracer: Tracer | None = None
        self._exporter: SpanExporter | None = None

    def open(self) -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        ours = Resource({SERVICE_NAME: "vlm-server", SERVICE_VERSION: __version__})
        self._exporter = self._open_exporter()
        self._provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("vlm_server", __version__)

    def close(self) -> None:
        """Sends what is left, for a few seconds at most. Blocks."""
        provider, self._provider, self._tracer = self._provider, None, None
        if provider is None or self._exporter is None:
            return
        ending = threading.Thread(target=provider.shutdown, name="end-traces", daemon=True)  # knows no limit but half a minute
        ending.start()
        ending.join(FLUSH_LIMIT_S)
        if ending.is_alive():
            self._exporter.shutdown()  # ends the retries that it waits for

    def begin(self, scope: Scope, timings: StageTimings) -> "RequestSpan | None":
        """The span of a request that begins now; None while closed."""
        return None if self._tracer is None else RequestSpan(self._tracer, scope, timings)


class RequestSpan:
    """One request's span; `end` gives it its stages."""

    def __init__(self, tracer: "Tracer", scope: Scope, timings: StageTimings) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers = Headers(scope=scope)
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if _is_plain(headers.get(name, ""))}
        parent = TraceContextTextMapPropagator().extract(carrier)
        self._tracer = tracer
        self._timings = timings
        self._offset_ns = time.time_ns() - time.monotonic_ns()  # our clock's to the world's
        self._method = str(scope["method"])
        began_ns = self._ns(timings.began_s)
        self._span = tracer.start_span(self._method, context=parent, kind=SpanKind.SERVER, start_time=began_ns)

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def end(self, route: str, status: int, facts: Mapping[str, Any]) -> None:
        """route: as it is declared. facts: those of the request's line in the log."""
        if self._span.is_recording():
            self._describe(route, status, facts)
            self._add_stages()
        self._span.end(self._ns(time.monotonic()))

    def _describe(self, route: str, status: int, facts: Mapping[str, Any]) -> None:
        from opentelemetry.trace import StatusCode

        span = self._span
        span.update_name(f"{self._method} {route}")
        span.set_attributes({"http.request.method": self._method, "http.route": route, "http.response.status_code": status})
        span.set_attributes({_ATTRIBUTES[name]: value for name, value in facts.items() if name in _ATTRIBUTES})
        if "finish_reason" in facts:
            span.set_attribute("gen_ai.response.finish_reasons", str(facts["finish_reason"]).split(","))
        if status >= 500 or (status == 200 and "error" in facts):
            span.set_status(StatusCode.ERROR, facts.get("error"))

    def _add_stages(self) -> None:
        from opentelemetry.trace import set_span_in_context

        within = set_span_in_context(self._span)
        for stage in self._timings.spans.values():
            span = self._add(stage.name, stage.began_s, stage.ended_s, within)
            if stage.name == "pictures":
                self._add_pictures(stage.began_s, set_span_in_context(span))

    def _add_pictures(self, began_s: float, within: "Context") -> None:
        """Each picture's stages one after the other, from the beginning of all: how long they took is known, and not when they waited."""
        for index, stages_s in enumerate(self._timings.pictures[:MAX_PICTURES]):
            at_s = began_s
            for name, seconds in stages_s.items():
                self._add(f"{PICTURE}-{name}", at_s, at_s + seconds, within, {"vlm.picture.index": index})
                at_s += seconds

    def _add(self, name: str, began_s: float, ended_s: float, within: "Context", attributes: Mapping[str, int] | None = None) -> "Span":
        span = self._tracer.start_span(name, context=within, attributes=attributes, start_time=self._ns(began_s))
        span.end(self._ns(ended_s))
        return span

    def _ns(self, monotonic_s: float) -> int:
        """Nanoseconds since 1970."""
        return round(1e9 * monotonic_s) + self._offset_ns


def _is_plain(value: str) -> bool:
    """What is not is left out: the library writes into the log what it cannot read."""
    return 0 < len(value) <= MAX_STATE_CHARACTERS and value.isascii() and value.isprintable()


def _is_missing(name: str) -> bool:
    try:
        return find_spec(name) is None
    except ModuleNotFoundError:  # a package above it
        return True
