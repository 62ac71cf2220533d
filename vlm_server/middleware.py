"""What wraps every HTTP request: its id, its log line, the limit of its body. Pure ASGI, so that streams pass through untouched."""

import logging
import re
import time
import uuid
from collections.abc import Mapping, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm_server.errors import ApiError, RefusedBodyError, speaks_anthropic, to_api_error
from vlm_server.metrics import Metrics
from vlm_server.stage_timings import StageTimings
from vlm_server.tracing import RequestSpan, Tracing

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
# Asked for every few seconds; logged at debug.
_QUIET_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/metrics", "/status"})


class RequestLog:
    """Gives each request its `X-Request-Id`, counts, logs and traces it when it ends, and answers what nobody else caught.

    Routes may put numbers for the line into `request_facts(scope)`; never a prompt, a picture or a key. What they measured into
    `request_timings(scope)` before the answer begins becomes its `Server-Timing`.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        facts: dict[str, Any] = {"id": request_id}
        scope["request_facts"] = facts
        scope["request_timings"] = timings = StageTimings(observer=self._metrics)
        span = self._tracing.begin(scope, timings) if self._tracing is not None and scope["path"] not in _QUIET_PATHS else None
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if speaks_anthropic(scope):
                    headers["request-id"] = request_id  # where its clients look
                if timings.seconds:
                    headers["server-timing"] = timings.header()
            await send(message)

        self._metrics.request_started()
        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("request %s failed", request_id)
            if not status:
                await to_api_error(error).response(scope)(scope, receive, send_with_id)
        finally:
            self._ended(scope, status, facts, timings, span)

    def _ended(self, scope: Scope, status: int, facts: dict[str, Any], timings: StageTimings, span: RequestSpan | None) -> None:
        duration_s = time.monotonic() - timings.began_s
        if timings.pictures:
            facts["pictures"] = len(timings.pictures)
        self._metrics.request_ended(_route(scope), status, duration_s, facts.get("error"))
        if span is not None:
            facts["trace_id"] = span.trace_id
            span.end(_route(scope), status, facts)
        _log(scope, status, duration_s, facts, timings)


def request_facts(scope: Scope) -> MutableMapping[str, Any]:
    """What the request's log line says beside path, status and time."""
    facts: MutableMapping[str, Any] = scope["request_facts"]
    return facts


def request_timings(scope: Scope) -> StageTimings:
    """The stages of the request so far."""
    timings: StageTimings = scope["request_timings"]
    return timings


def _request_id(given: str | None) -> str:
    return given if given and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _route(scope: Scope) -> str:
    """The route's pattern; paths that no route knows share one name, so that a scanner cannot fill the metrics."""
    return getattr(scope.get("route"), "path", "other")


def _log(scope: Scope, status: int, duration_s: float, facts: Mapping[str, Any], timings: StageTimings) -> None:
    """For people with the path as it came; for machines with the route, whose values are few."""
    level = logging.DEBUG if scope["path"] in _QUIET_PATHS else logging.INFO
    if logger.isEnabledFor(level):
        words = " ".join(f"{name}={value}" for name, value in facts.items())
        request = {"method": scope["method"], "route": _route(scope), "status": status, "duration_ms": _ms(duration_s)}
        if timings.first_token_s is not None:
            request["first_token_ms"] = _ms(timings.first_token_s)
        stages = {name: _ms(seconds) for name, seconds in timings.seconds.items()}
        fields = {"message": "request", **request, **facts, **({"stages_ms": stages} if stages else {})}
        line = "%s %r %d %.3fs %s"
        logger.log(level, line, scope["method"], scope["path"], status, duration_s, words, extra={"fields": fields})


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


class RootPath:
    """Strips the prefix under which a reverse proxy shows this server from paths that still have it."""

    def __init__(self, app: ASGIApp, *, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._root_path and scope["path"].startswith(f"{self._root_path}/"):
            scope = {**scope, "path": scope["path"].removeprefix(self._root_path)}
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses a body of more than `limit_bytes` with a 413, before reading it where its length is stated."""

    def __init__(self, app: ASGIApp, *, limit_bytes: int) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stated = Headers(scope=scope).get("content-length", "")
        if stated.isdecimal() and int(stated) > self._limit_bytes:
            await self._refusal().response(scope)(scope, receive, send)
            return
        num_bytes = 0

        async def limited_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._limit_bytes:
                raise RefusedBodyError(self._refusal())
            return message

        await self._app(scope, limited_receive, send)

    def _refusal(self) -> ApiError:
        return ApiError(413, "request_too_large", f"the body has more than {self._limit_bytes} bytes (--max-body-bytes)")
