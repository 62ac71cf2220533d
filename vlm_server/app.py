"""The HTTP application: opens and closes what it serves, wraps it, and turns exceptions into error bodies (the only place)."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import replace
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Match

from engine.request import EngineError
from vision.budget import Budget, BudgetFullError
from vision.image import MediaError
from vision.service import VisionStats
from vlm_server.aborting import RunningRequests, TracksAborts
from vlm_server.admission import QUOTA_HEADERS, EnforceQuotas
from vlm_server.answer_formats import AnswerFormats
from vlm_server.api_keys import load_keys
from vlm_server.auth import KeyRing, RequireApiKey
from vlm_server.backend import Backend, OpenBackend, open_backend
from vlm_server.body_budget import HoldsMedia
from vlm_server.chat_page import ChatPage
from vlm_server.config import ALPACA, ServerConfig
from vlm_server.context import ServerContext
from vlm_server.docs import DOCS_PATHS, add_docs, operation_id
from vlm_server.errors import ApiError, to_api_error, validation_error
from vlm_server.files import Files
from vlm_server.jinja_process import RendererLostError
from vlm_server.loop_lag import watching_lag
from vlm_server.metered_engine import metered_engine
from vlm_server.metrics import Metrics
from vlm_server.middleware import BodyLimit, RequestLog, RootPath
from vlm_server.queued_tokens import QUEUED_TOKENS, bounded_queue
from vlm_server.quotas import Quota, QuotaExceededError
from vlm_server.readiness import Readiness
from vlm_server.responses.records import ResponseRecords
from vlm_server.routes import (
    abort,
    alpaca,
    chat,
    completions,
    control,
    embeddings,
    files,
    generate,
    health,
    interactive,
    messages,
    models,
    responses,
    scoring,
    status,
    tokens,
)
from vlm_server.sampling import SamplingDefaults
from vlm_server.sessions.history import SessionBusyError, Sessions
from vlm_server.sessions.opening import OpenStore, open_store
from vlm_server.sessions.store import Limits, RecordStore, StoreError
from vlm_server.sessions.store import Quota as StoreQuota
from vlm_server.stage_totals import StageTotals, timed_engine
from vlm_server.status_board import StatusBoard
from vlm_server.tracing import Tracing, otlp_exporter
from vlm_server.turns import Turns
from vlm_server.waiting_room import RefuseWhenFull, WaitingRoom, awaited_engine


def create_app(
    config: ServerConfig, *, open_backend: OpenBackend = open_backend, open_store: OpenStore = open_store, tracing: Tracing | None = None
) -> FastAPI:
    """The server of one model. `open_backend` gives the engine and the pipeline, `open_store` what outlives them; tests put scripted ones
    there. tracing: in place of that to the config's collector. Its `state.keys` is the KeyRing, or None; `state.readiness` is told when the
    server stops. Raises ApiKeysError.
    """
    metrics = Metrics()
    if tracing is None and config.otlp_endpoint is not None:
        tracing = Tracing(otlp_exporter(config.otlp_endpoint))
    running = RunningRequests() if config.enable_abort_handling else None
    keys = _key_ring(config, metrics)
    readiness, totals = Readiness(), StageTotals()
    board, room = StatusBoard(totals), WaitingRoom(config.engine.max_waiting)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        defaults = SamplingDefaults.load(config.generation_config, Path(config.engine.model_folder))
        async with _opened(tracing), open_store(config.session_store) as store, open_backend(config) as backend:
            limits = Limits(config.session_ttl_s, config.max_sessions)
            sessions = Sessions(store, model=config.model_name, limits=limits, max_bytes=config.max_session_bytes)
            kept = Limits(config.response_ttl_s, config.max_responses)
            records = ResponseRecords(store, limits=kept, max_bytes=config.max_session_bytes)
            formats = _answer_formats(config, backend)
            async with (
                contextlib.aclosing(Turns(sessions, backend.pipeline, limits=config.limits)) as turns,
                readiness.watching(backend.engine, backend.probe),
            ):
                backend = replace(backend, engine=timed_engine(backend.engine, totals))
                uploads, created_s = _files(config, store), int(time.time())
                limited = _with_token_budget(backend, config)
                engine = awaited_engine(limited.engine, room)
                charging = replace(limited, engine=metered_engine(engine) if keys is not None else engine)
                app.state.context = ServerContext(config, charging, defaults, metrics, turns, formats, uploads, records, created_s, running)
                async with board.sampling(backend.engine, backend.vision_stats), watching_lag(metrics.loop_lagged):
                    yield

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, generate_unique_id_function=operation_id)
    answering = (alpaca,) if config.compat == ALPACA else (chat, completions, embeddings)
    for module in (models, *answering, responses, messages, generate, interactive, tokens, scoring, files, control, abort):
        app.include_router(module.router)
    app.include_router(messages.models_router)
    app.include_router(messages.router, prefix="/anthropic", include_in_schema=False)  # all of Anthropic's under one base address
    app.include_router(health.health_router)
    if config.enable_metrics:
        app.include_router(health.metrics_router)
        app.include_router(status.router)
    if config.enable_docs:
        add_docs(app, config)
    chat_page = ChatPage(config) if config.enable_ui else None
    if chat_page is not None:
        chat_page.add_to(app)
    _add_error_handlers(app)
    if running is not None:
        app.add_middleware(TracksAborts, running=running)
    open_paths = (DOCS_PATHS if config.enable_docs else frozenset()) | (chat_page.paths if chat_page else frozenset())
    _add_middleware(app, config, metrics, keys, tracing, room, open_paths=open_paths)
    app.state.keys = keys
    app.state.readiness, app.state.status_board = readiness, board
    return app


@contextlib.asynccontextmanager
async def _opened(tracing: Tracing | None) -> AsyncIterator[None]:
    if tracing is None:
        yield
        return
    await asyncio.to_thread(tracing.open)
    try:
        yield
    finally:
        await asyncio.to_thread(tracing.close)


def _files(config: ServerConfig, store: RecordStore) -> Files:
    """What one request names is bound as data: URLs in its body would be."""
    return Files(store, StoreQuota(config.max_files, config.max_file_bytes_per_key), max_request_bytes=config.max_body_bytes)


def _with_token_budget(backend: Backend, config: ServerConfig) -> Backend:
    """Its stats have all budgets."""
    queue = Budget(QUEUED_TOKENS, config.max_queued_tokens, wait_s=config.vision.budget_wait_s)
    budgets = (*backend.media.all(), queue)

    def vision_stats() -> VisionStats:
        return replace(backend.vision_stats(), budgets={budget.name: budget.stats() for budget in budgets})

    return replace(backend, engine=bounded_queue(backend.engine, queue), vision_stats=vision_stats)


def _key_ring(config: ServerConfig, metrics: Metrics) -> KeyRing | None:
    """None: no key is needed."""
    if not config.needs_key:
        return None
    return KeyRing(
        lambda: load_keys(config.api_keys, config.api_key_files),
        new_quota=lambda key: Quota(key.limits, owner=key.name, on_refused=metrics.quota_refused),
    )


def _answer_formats(config: ServerConfig, backend: Backend) -> AnswerFormats:
    template = backend.pipeline.template
    return AnswerFormats.choose(config.tool_call_parser, config.reasoning_parser, template=template.text, shows_tools=template.shows_tools)


def _add_error_handlers(app: FastAPI) -> None:
    for kind in (
        ApiError,
        EngineError,
        MediaError,
        BudgetFullError,
        QuotaExceededError,
        RendererLostError,
        SessionBusyError,
        StoreError,
        HTTPException,
    ):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)


async def _on_error(request: Request, error: Exception) -> Response:
    api_error = to_api_error(error)
    if api_error.status == 405 and (methods := _methods_of(request)):
        api_error.headers["Allow"] = ", ".join(methods)
    return api_error.response(request.scope)


def _methods_of(request: Request) -> list[str]:
    """Those that the path is routed for; the router itself names those of one handler alone. Empty where what it leads to says no."""
    if _leads_anywhere(request, request.method):  # mounted files, which refuse methods by themselves
        return []
    return [method for method in ("GET", "POST", "DELETE") if _leads_anywhere(request, method)]


def _leads_anywhere(request: Request, method: str) -> bool:
    scope = {**request.scope, "method": method}
    return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    is_json = request.method == "GET" or _is_json(request.headers.get("content-type", ""))
    return await _on_error(request, validation_error(error.errors(), is_json=is_json))


def _is_json(content_type: str) -> bool:
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == "application/json" or media_type.endswith("+json")


def _add_middleware(
    app: FastAPI,
    config: ServerConfig,
    metrics: Metrics,
    keys: KeyRing | None,
    tracing: Tracing | None,
    room: WaitingRoom,
    *,
    open_paths: Collection[str],
) -> None:
    """The last one added is the outermost: prefix, log, CORS, keys, quotas, waiting room, body limit, media in flight, routes."""
    app.add_middleware(HoldsMedia)
    app.add_middleware(BodyLimit, limit_bytes=config.max_body_bytes)
    app.add_middleware(RefuseWhenFull, room=room)
    if keys is not None:
        app.add_middleware(EnforceQuotas)
        app.add_middleware(RequireApiKey, keys=keys, open_paths=open_paths)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=config.allow_origins,
        allow_methods=config.allow_methods,
        allow_headers=config.allow_headers,
        allow_credentials=config.allow_credentials,
        expose_headers=["X-Request-Id", "Server-Timing", "Retry-After", *QUOTA_HEADERS],
    )
    app.add_middleware(RequestLog, metrics=metrics, tracing=tracing)
    app.add_middleware(RootPath, root_path=config.root_path)
