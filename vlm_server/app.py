"""The HTTP application: opens and closes what it serves, wraps it, and turns exceptions into error bodies (the only place)."""

import contextlib
import time
from collections.abc import AsyncIterator, Collection
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from engine.request import EngineError
from vision.image import MediaError
from vlm_server.answer_formats import AnswerFormats
from vlm_server.auth import RequireApiKey
from vlm_server.backend import Backend, OpenBackend, open_backend
from vlm_server.chat_page import ChatPage
from vlm_server.config import ServerConfig
from vlm_server.context import ServerContext
from vlm_server.docs import add_docs, operation_id
from vlm_server.errors import ApiError, to_api_error, validation_error
from vlm_server.metrics import Metrics
from vlm_server.middleware import BodyLimit, RequestLog, RootPath, request_facts
from vlm_server.routes import chat, completions, control, embeddings, health, interactive, models, scoring, tokens
from vlm_server.sampling import SamplingDefaults
from vlm_server.sessions.history import SessionBusyError, Sessions
from vlm_server.sessions.opening import OpenStore, open_store
from vlm_server.sessions.store import Limits, StoreError
from vlm_server.turns import Turns


def create_app(config: ServerConfig, *, open_backend: OpenBackend = open_backend, open_store: OpenStore = open_store) -> FastAPI:
    """The server of one model. `open_backend` gives the engine and the pipeline, `open_store` what outlives them; tests put scripted ones
    there.
    """
    metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        defaults = SamplingDefaults.load(config.generation_config, Path(config.engine.model_folder))
        async with open_store(config.session_store) as store, open_backend(config) as backend:
            limits = Limits(config.session_ttl_s, config.max_sessions)
            sessions = Sessions(store, model=config.model_name, limits=limits, max_bytes=config.max_session_bytes)
            formats = _answer_formats(config, backend)
            async with contextlib.aclosing(Turns(sessions, backend.pipeline)) as turns:
                app.state.context = ServerContext(config, backend, defaults, metrics, turns, formats, created_s=int(time.time()))
                yield

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, generate_unique_id_function=operation_id)
    for module in (models, chat, completions, interactive, embeddings, tokens, scoring, control):
        app.include_router(module.router)
    app.include_router(health.health_router)
    if config.enable_metrics:
        app.include_router(health.metrics_router)
    if config.enable_docs:
        add_docs(app, config)
    chat_page = ChatPage(config) if config.enable_ui else None
    if chat_page is not None:
        chat_page.add_to(app)
    _add_error_handlers(app)
    _add_middleware(app, config, metrics, open_paths=chat_page.paths if chat_page else ())
    return app


def _answer_formats(config: ServerConfig, backend: Backend) -> AnswerFormats:
    template = backend.pipeline.template
    return AnswerFormats.choose(config.tool_call_parser, config.reasoning_parser, template=template.text, shows_tools=template.shows_tools)


def _add_error_handlers(app: FastAPI) -> None:
    for kind in (ApiError, EngineError, MediaError, SessionBusyError, StoreError, HTTPException):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)


async def _on_error(request: Request, error: Exception) -> Response:
    api_error = to_api_error(error)
    request_facts(request.scope)["error"] = api_error.code
    return api_error.response()


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    is_json = request.method == "GET" or _is_json(request.headers.get("content-type", ""))
    return await _on_error(request, validation_error(error.errors(), is_json=is_json))


def _is_json(content_type: str) -> bool:
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == "application/json" or media_type.endswith("+json")


def _add_middleware(app: FastAPI, config: ServerConfig, metrics: Metrics, *, open_paths: Collection[str]) -> None:
    """The last one added is the outermost: prefix, log, CORS, keys, body limit, routes."""
    app.add_middleware(BodyLimit, limit_bytes=config.max_body_bytes)
    if config.api_keys:
        app.add_middleware(RequireApiKey, api_keys=config.api_keys, open_paths=open_paths)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=config.allow_origins,
        allow_methods=config.allow_methods,
        allow_headers=config.allow_headers,
        allow_credentials=config.allow_credentials,
        expose_headers=["X-Request-Id", "Server-Timing"],
    )
    app.add_middleware(RequestLog, metrics=metrics)
    app.add_middleware(RootPath, root_path=config.root_path)
