"""Traces: a span per request and per stage, in the caller's trace, with nothing in them that somebody said or was let in by."""

import contextlib
import gzip
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import requests
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.contract.fake_engine import FIRST_TOKEN_S, PREPARATION_S, FakeBackend
from tests.contract.running import MODEL, RunningServer, fake_config, running_server, serving
from vlm_server import tracing as tracing_module
from vlm_server.app import create_app
from vlm_server.cli import main
from vlm_server.examples import RED_CIRCLE
from vlm_server.tracing import Tracing, check_installed

CHAT = "/v1/chat/completions"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PICTURE = {"type": "image_url", "image_url": {"url": RED_CIRCLE}}


class Traced:
    """A server whose spans stay here; they are all there once it has ended."""

    def __init__(self, server: RunningServer, exporter: InMemorySpanExporter) -> None:
        self.server = server
        self._exporter = exporter

    def ask(self, content: Any = "a-private-question", *, headers: dict[str, str] | None = None, **fields: Any) -> requests.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 3, **fields}
        return requests.post(self.server.url + CHAT, json=body, headers=headers, timeout=10)

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    @property
    def requests(self) -> list[ReadableSpan]:
        return [span for span in self.spans if span.kind is SpanKind.SERVER]

    def within(self, span: ReadableSpan) -> list[ReadableSpan]:
        assert span.context is not None
        return [other for other in self.spans if other.parent is not None and other.parent.span_id == span.context.span_id]


@contextlib.contextmanager
def traced(**config: Any) -> Iterator[Traced]:
    backend, exporter = FakeBackend(), InMemorySpanExporter()
    app = create_app(fake_config(**config), open_backend=backend.open, tracing=Tracing(lambda: exporter))
    with serving(app) as url:
        yield Traced(RunningServer(url, MODEL, backend), exporter)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_of_its_callers_trace_and_its_stages_are_spans_within_it(stream: bool) -> None:
    with traced() as found:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "r-1"}
        answer = found.ask([PICTURE], headers=headers, stream=stream)

    assert answer.status_code == 200
    [request] = found.requests
    assert request.context is not None
    assert request.parent is not None
    assert (f"{request.context.trace_id:032x}", f"{request.parent.span_id:016x}") == (TRACE, PARENT)
    assert request.name == f"POST {CHAT}"
    attributes = dict(request.attributes or {})
    assert attributes["gen_ai.usage.output_tokens"] == 3
    assert (attributes["vlm.request.id"], attributes["vlm.pictures"], attributes["gen_ai.request.model"]) == ("r-1", 1, MODEL)
    assert (attributes["http.route"], attributes["http.response.status_code"]) == (CHAT, 200)
    assert attributes["gen_ai.response.finish_reasons"] == ("length",)
    stages = {span.name: span for span in found.within(request)}
    assert set(stages) == {*PREPARATION_S, "pictures", *FIRST_TOKEN_S, "generate"}
    assert {span.name for span in found.within(stages["pictures"])} == {"picture-fetch"}


def test_stages_of_the_engine_lie_behind_each_other_and_end_with_the_first_token() -> None:
    with traced() as found:
        found.ask()

    [request] = found.requests
    stages = {span.name: span for span in found.within(request)}
    queue, encode, prefill, generate = (stages[name] for name in ("queue", "encode", "prefill", "generate"))
    for before, after in ((queue, encode), (encode, prefill), (prefill, generate)):
        assert abs(times(before)[1] - times(after)[0]) < 1000  # nanoseconds: what is lost on the way through floats
    for name, seconds in FIRST_TOKEN_S.items():
        began_ns, ended_ns = times(stages[name])
        assert ended_ns - began_ns == pytest.approx(1e9 * seconds, abs=1000)
    assert times(generate)[1] <= times(request)[1]
    assert abs(times(request)[1] - time.time_ns()) < 60e9


def times(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time


@pytest.mark.parametrize("given", [None, "nonsense", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{PARENT}-01" + "x" * 10_000])
def test_without_a_trace_that_can_be_read_a_request_begins_its_own(given: str | None) -> None:
    with traced() as found:
        found.ask(headers={} if given is None else {"traceparent": given})

    [request] = found.requests
    assert request.parent is None
    assert request.context is not None
    assert f"{request.context.trace_id:032x}" not in (TRACE, "0" * 32)


@pytest.mark.parametrize("state", ["a=1\u009b2J", "x" * 5000])
def test_what_no_trace_writes_does_not_reach_the_log(state: str, caplog: pytest.LogCaptureFixture) -> None:
    with traced() as found:
        found.ask(headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": state.encode("latin-1")})

    assert len(found.requests) == 1
    assert state[:3] not in caplog.text


def test_a_caller_who_does_not_record_gets_no_spans() -> None:
    with traced() as found:
        assert found.ask(headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}).status_code == 200

    assert found.spans == ()


def test_what_failed_is_marked_and_what_was_refused_has_its_code() -> None:
    with traced() as found:
        found.ask(temperature=7)
        found.server.backend.engine.fails_after = 1
        found.ask()
        found.ask(stream=True)

    refused, failed, broken = found.requests
    codes = [dict(span.attributes or {})["error.type"] for span in found.requests]
    assert codes == ["invalid_value", "engine_unavailable", "engine_unavailable"]
    assert [span.status.status_code for span in (refused, failed, broken)] == [StatusCode.UNSET, StatusCode.ERROR, StatusCode.ERROR]


def test_pages_that_are_asked_for_every_few_seconds_are_not_traced_and_unknown_paths_are_not_named() -> None:
    with traced() as found:
        for path in ("/health", "/metrics", "/secret-path"):
            requests.get(found.server.url + path, timeout=10)

    assert [span.name for span in found.requests] == ["GET other"]


def test_nobodys_prompt_picture_address_or_key_is_in_a_span() -> None:
    with traced(api_keys=("hush-hush-key",)) as found:
        part = {"type": "image_url", "image_url": {"url": "http://pictures.example/secret.png?sig=token"}}
        for content in ("a-private-question", [part, PICTURE], [{"type": "image_url", "image_url": {"url": "http://bad.example/x"}}]):
            found.ask(content, headers={"Authorization": "Bearer hush-hush-key"})
        found.ask(headers={"Authorization": "Bearer another-key", "baggage": "user=alice"})

    written = "".join(span.to_json() for span in found.spans)
    assert len(found.requests) == 4
    for secret in ("private", "Hello", "pictures.example", "token=", "sig=", "bad.example", "data:image", "hush", "another-key", "alice"):
        assert secret not in written


def test_only_so_many_pictures_of_a_request_have_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing_module, "MAX_PICTURES", 2)
    with traced() as found:
        found.ask([PICTURE] * 5)

    spans = [span for span in found.spans if span.name == "picture-fetch"]
    assert [dict(span.attributes or {})["vlm.picture.index"] for span in spans] == [0, 1]


def test_the_line_in_the_log_names_the_trace(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="vlm_server.middleware"):
        with traced() as found:
            found.ask(headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
        with running_server() as plain:
            requests.get(f"{plain.url}/v1/models", timeout=10)

    assert [getattr(record, "fields", {}).get("trace_id") for record in caplog.records] == [TRACE, None]


class Export(NamedTuple):
    """What a collector was sent."""

    path: str
    team: str | None  # a header that the environment sets
    content: ExportTraceServiceRequest


@contextlib.contextmanager
def collector(received: list[Export]) -> Iterator[str]:
    """Takes what is sent to it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            encoding = self.headers.get("content-encoding")
            body = gzip.decompress(body) if encoding == "gzip" else body
            received.append(Export(self.path, self.headers.get("x-team"), ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("path", "expected"), [("", "/v1/traces"), ("/", "/v1/traces"), ("/own/path", "/own/path")])
def test_a_collector_gets_the_spans_over_otlp(monkeypatch: pytest.MonkeyPatch, path: str, expected: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=a")
    received: list[Export] = []
    with collector(received) as url:
        app = create_app(fake_config(otlp_endpoint=url + path), open_backend=FakeBackend().open)
        with serving(app) as server_url:
            requests.get(f"{server_url}/v1/models", timeout=10)

    [export] = received
    assert (export.path, export.team) == (expected, "a")
    exported = export.content.resource_spans[0]
    assert {"service.name": "vlm-server"}.items() <= {each.key: each.value.string_value for each in exported.resource.attributes}.items()
    assert [span.name for span in exported.scope_spans[0].spans] == ["GET /v1/models"]


def test_a_collector_that_does_not_answer_delays_the_end_by_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing_module, "FLUSH_LIMIT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        app = create_app(fake_config(otlp_endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}"), open_backend=FakeBackend().open)
        with serving(app) as url:
            assert requests.get(f"{url}/v1/models", timeout=10).status_code == 200
            began_s = time.monotonic()

        assert time.monotonic() - began_s < 4  # uvicorn's own end and ours; one batch may take EXPORT_LIMIT_S


def test_without_the_packages_the_server_does_not_start_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracing_module, "find_spec", lambda name: None)

    assert main(["serve", "/no/such/model", "--otlp-endpoint", "http://127.0.0.1:4318"]) == 1

    assert "vlm-server[tracing]" in capsys.readouterr().err


def test_a_package_whose_parent_is_missing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    monkeypatch.setattr(tracing_module, "find_spec", lambda name: __import__("no_such_package"))

    with pytest.raises(ValueError, match="tracing"):
        check_installed()


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1:4318", "grpc://127.0.0.1:4317"])
def test_an_endpoint_is_a_url(endpoint: str) -> None:
    with pytest.raises(ValueError, match="otlp_endpoint"):
        fake_config(otlp_endpoint=endpoint)
