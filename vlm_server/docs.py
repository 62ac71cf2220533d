"""`openapi.json`, and the Swagger page at `/` with its assets from this package: the page needs no network."""

import asyncio
import html
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from vlm_server import __version__
from vlm_server.anthropic.response_schema import AnthropicErrorResponse, MessageStreamEvent
from vlm_server.auth import OPEN_PATHS
from vlm_server.client_schemas import fit_for_clients
from vlm_server.config import ALPACA, ServerConfig
from vlm_server.examples import alpaca_examples, request_examples
from vlm_server.response_schema import (
    ChatCompletionStreamResponse,
    CompletionStreamResponse,
    ErrorResponse,
    GenerateReqOutput,
    HTTPValidationError,
    ValidationError,
)
from vlm_server.responses.schema import ResponseStreamEvent

ASSETS = Path(__file__).parent / "ui" / "swagger"
DOCS_PATHS = frozenset({"/", "/openapi.json"}).union(f"/swagger-ui/{path.name}" for path in ASSETS.iterdir())  # need no key

# The page shares its origin with the chat page, whose storage may hold a key. Swagger writes styles into its elements.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

# All addresses are relative, so that the page also works behind a prefix.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="swagger-ui/favicon-32x32.png">
<link rel="stylesheet" href="swagger-ui/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="swagger-ui/swagger-ui-bundle.js"></script>
<script src="swagger-ui/start.js"></script>
</body>
</html>
"""
_RESPONSES = "/v1/responses"
_STREAMED: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionStreamResponse,
    "/v1/completions": CompletionStreamResponse,
    _RESPONSES: ResponseStreamEvent,
    "/generate": GenerateReqOutput,
}
_SERVER_TIMING = {
    "description": "Milliseconds by stage, as in `template;dur=0.4, pictures;dur=31.2, …`: files (uploaded ones, read from the store), "
    "template, pictures (fetched, decoded, resized; the slowest of each as picture-fetch, picture-decode, picture-preprocess), tokenize, "
    "then in the engine queue, encode (pictures) and prefill (to the first token); without `stream` also generate (the rest).",
    "schema": {"type": "string"},
}
_INTERACTIVE = "/v1/chat/interactive"
_FILES = "/v1/files"
_MESSAGES = "/v1/messages"
_ABORT = "/abort_request"
_NEVER_ANSWERED = "/pooling"  # no model here has what it takes
_MAY_BE_OFF = "/terminate"
_READY = "/health/ready"
_STATUS = "/status"
_HEALTH = {"/health": "HealthResponse", _READY: "ReadyResponse"}  # those whose 503 has the shape of their 200
_ERRORS = {
    "400": "The request is wrong, or not allowed here; `param` names the field.",
    "401": "The API key is missing or unknown.",
    "404": "The model, the file or the response does not exist.",
    "409": "Another turn of the session is under way, or what was kept cannot be read by this version.",
    "413": "The body is too large, or the API key has too many files.",
    "429": "Too many requests wait, or the key's quota is used up; try again after `Retry-After` seconds.",
    "500": "The server failed.",
    "501": "The server was started without the flag that this needs.",
    "503": "The engine, or the session store, is not ready; try again after `Retry-After` seconds.",
}


def add_docs(app: FastAPI, config: ServerConfig) -> None:
    page = _PAGE.format(title=html.escape(f"{config.model_name} · vlm-server"))
    schemas: list[bytes] = []  # built at the first request
    building = asyncio.Lock()

    async def swagger(request: Request) -> HTMLResponse:
        return HTMLResponse(page, headers=_HEADERS)

    async def openapi(request: Request) -> Response:
        async with building:
            if not schemas:
                schemas.append(await asyncio.to_thread(_openapi_json, app, config))  # a second or two, in which streams go on
        return Response(schemas[0], media_type="application/json")

    app.add_route("/", swagger, include_in_schema=False)
    app.add_route("/openapi.json", openapi, include_in_schema=False)
    app.mount("/swagger-ui", StaticFiles(directory=ASSETS), name="swagger-ui")


def _openapi_json(app: FastAPI, config: ServerConfig) -> bytes:
    return bytes(JSONResponse(openapi_schema(app, config)).body)


def openapi_schema(app: FastAPI, config: ServerConfig) -> dict[str, Any]:
    """FastAPI's, with our examples, errors and event streams."""
    schema = get_openapi(
        title="vlm-server",
        version=__version__,
        description="OpenAI-compatible API for image-text models.",
        routes=app.routes,
        servers=[{"url": config.root_path}] if config.root_path else None,
    )
    components = schema["components"]["schemas"]
    for model in (*_STREAMED.values(), ErrorResponse, HTTPValidationError, ValidationError, MessageStreamEvent, AnthropicErrorResponse):
        _add_component(components, model)
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            _complete(path, method, operation, config)
    if config.needs_key:
        schema["components"]["securitySchemes"] = {"ApiKey": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"ApiKey": []}]
    fit_for_clients(schema)
    return schema


def operation_id(route: APIRoute) -> str:
    """The handler's name, as LMDeploy's clients call the method: `chat_completions_v1`."""
    return f"{route.name}_v1" if route.path.startswith("/v1/") else route.name


def _add_component(components: dict[str, Any], model: Any) -> None:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    for name, definition in schema.pop("$defs", {}).items():
        components.setdefault(name, definition)
    components[model.__name__] = schema


def _complete(path: str, method: str, operation: dict[str, Any], config: ServerConfig) -> None:
    responses = operation["responses"]
    responses.pop("422", None)  # our validation errors are 400
    if path == _NEVER_ANSWERED:
        del responses["200"]
    for status in _statuses(path, method, config):
        error = _error_model(path, status, has_body="requestBody" in operation)
        responses[status] = {"description": _ERRORS[status], "content": _content(error.__name__)}
    if path in _STREAMED:
        stream_model = _STREAMED[path].__name__
        events = "`event: …` and `data: {…}`" if path == _RESPONSES else "`data: {…}`"
        description = f"Events {events} of the shape {stream_model}"
        description += ", with `stream: true`." if path == _RESPONSES else ", then `data: [DONE]`, with `stream: true`."
        stream_schema = {"type": "string", "description": description}
        responses["200"]["headers"] = {"Server-Timing": _SERVER_TIMING}
        responses["200"]["content"]["text/event-stream"] = {"schema": stream_schema, "x-event-schema": _ref(stream_model)}
    if path == _MESSAGES:
        description = "With `stream: true`, events `event: TYPE` and `data: {…}` of the shape MessageStreamEvent."
        responses["200"]["headers"] = {"Server-Timing": _SERVER_TIMING}
        event_stream = {"schema": {"type": "string", "description": description}, "x-event-schema": _ref(MessageStreamEvent.__name__)}
        responses["200"]["content"]["text/event-stream"] = event_stream
    if path == _INTERACTIVE:
        responses["200"]["headers"] = {"Server-Timing": _SERVER_TIMING}
        description = "With `stream: true`, the answer in pieces: one InteractiveResponse per line, nothing before or after it."
        responses["200"]["content"]["text/event-stream"] = {"schema": {"type": "string", "description": description}}
    if "requestBody" in operation and (examples := _examples(config).get(path)):
        operation["requestBody"]["content"]["application/json"]["examples"] = examples
    for parameter in operation.get("parameters", ()):
        if parameter["name"] == "model_id":
            parameter["example"] = config.model_name
    if path == "/metrics":
        responses["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    if path in OPEN_PATHS:
        operation["security"] = [{}, {"ApiKey": []}] if path == _READY and config.needs_key else []  # {}: without one, too
    if path in _HEALTH:
        responses["503"]["content"] = _content(_HEALTH[path])


def _examples(config: ServerConfig) -> dict[str, dict[str, dict[str, Any]]]:
    return alpaca_examples() if config.compat == ALPACA else request_examples(config.model_name)


def _statuses(path: str, method: str, config: ServerConfig) -> list[str]:
    keyed = ["401", "429"] if config.needs_key and path not in OPEN_PATHS else []
    if path == _STATUS:
        return ["400", *keyed[:1]]
    if path == _READY:
        return ["400", *(["401"] if config.needs_key else []), "503"]
    if path.startswith(_FILES):
        return [*(["404"] if "{" in path else ["400"]), *keyed, *(["413"] if method == "post" else []), "503"]
    if path == _ABORT:
        return ["400", *keyed, "413", "501"]
    if method == "post":
        return ["400", *keyed[:1], "404", *(["409"] if path in (_INTERACTIVE, _RESPONSES) else []), "413", "429", "500", "503"]
    if path.startswith(_RESPONSES):
        return ["400", *keyed, "404", *(["409"] if method == "get" else []), "503"]
    return [*(["400"] if path == _MAY_BE_OFF else []), *keyed, *(["404"] if "{" in path else []), *(["503"] if path in _HEALTH else [])]


def _error_model(path: str, status: str, *, has_body: bool) -> type[BaseModel]:
    if path.startswith((_MESSAGES, "/anthropic/")):
        return AnthropicErrorResponse
    return HTTPValidationError if status == "400" and has_body else ErrorResponse


def _content(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(name)}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
