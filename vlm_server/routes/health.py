"""`GET /health`, `/health/live`, `/health/ready` and `GET /metrics`."""

from typing import Annotated

import msgspec
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from engine.request import EngineError
from vlm_server.auth import check_key
from vlm_server.context import context_of
from vlm_server.errors import RETRY_AFTER_S
from vlm_server.metrics import CONTENT_TYPE
from vlm_server.readiness import Readiness
from vlm_server.response_schema import HealthResponse, LiveResponse, ReadyResponse
from vlm_server.sessions.store import StoreError
from vlm_server.streaming import unless_client_leaves

health_router = APIRouter(tags=["operation"])
metrics_router = APIRouter(tags=["operation"])

_STATUS = {"ready": "healthy", "starting": "initializing"}


@health_router.get("/health", response_model=HealthResponse, summary="200 while the engine can take requests, else 503")
async def health(request: Request) -> Response:
    """Needs no API key. The message says what state the engine is in, and why where it failed."""
    engine = context_of(request).backend.engine
    status = _STATUS.get(str(engine.state), "unhealthy")
    message = f"the engine is {engine.state!s}" + (f": {engine.failure}" if engine.failure else "")
    content = msgspec.json.encode({"status": status, "message": message})
    if status == "healthy":
        return Response(content, media_type="application/json")
    return Response(content, 503, {"retry-after": str(RETRY_AFTER_S)}, media_type="application/json")


@health_router.get("/health/live", response_model=LiveResponse, summary="200 while the server answers, whatever the engine does")
async def health_live(request: Request) -> Response:
    """Needs no API key. An engine that died is started again by the server itself: nobody need restart the server for it."""
    return Response(b'{"status":"live"}', media_type="application/json")


@health_router.get("/health/ready", response_model=ReadyResponse, summary="200 once a picture went through the whole pipeline, else 503")
async def health_ready(
    request: Request,
    probe: Annotated[bool, Query(description="Try now, at most every ten seconds; needs an API key where the server has keys.")] = False,
) -> Response:
    """Needs no API key. A small built-in picture (a text, where the model takes none) goes through all stages at the start, after each
    restart of the engine, some seconds after a failure, and on demand; the answer is about the last time. It is in no cache and no metric.
    """
    readiness: Readiness = request.app.state.readiness
    if probe:
        check_key(request)
        standing = await unless_client_leaves(request, readiness.probed())
    else:
        standing = readiness.standing()
    content = msgspec.json.encode(standing.body())
    if standing.is_ready:
        return Response(content, media_type="application/json")
    return Response(content, 503, {"retry-after": str(RETRY_AFTER_S)}, media_type="application/json")


@metrics_router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Requests, tokens, caches, queues, pictures and sessions since the server was started."""
    context = context_of(request)
    try:
        stats = await context.backend.engine.stats()
    except (EngineError, TimeoutError):
        stats = None
    try:
        num_sessions = await context.turns.sessions.count()
    except StoreError:
        num_sessions = None
    page = context.metrics.page(
        stats,
        context.backend.vision_stats(),
        num_restarts=context.backend.engine.num_restarts,
        num_sessions=num_sessions,
        num_turns=context.turns.num_running,
    )
    return Response(page, media_type=CONTENT_TYPE)
