"""Anthropic's `POST /v1/messages`, `POST /v1/messages/count_tokens` and list of models, each also under `/anthropic`."""

import contextlib
import uuid
from collections.abc import Iterator
from typing import Annotated

import msgspec
from fastapi import APIRouter, Header, Request
from fastapi.openapi.models import Example
from starlette.responses import Response

from engine.request import EngineError
from vision.image import MediaError
from vlm_server.anthropic.field_names import FieldNames
from vlm_server.anthropic.models import model_info, model_list
from vlm_server.anthropic.protocol import CountTokensRequest, MessagesRequest
from vlm_server.anthropic.response_schema import MessageResponse, ModelInfo, ModelInfoList, TokenCount
from vlm_server.anthropic.shapes import MessageShape
from vlm_server.anthropic.translation import translate, without_effect
from vlm_server.chats import begin_chat, count_tokens
from vlm_server.context import context_of
from vlm_server.errors import ApiError, to_api_error
from vlm_server.field_rules import check_fields
from vlm_server.json_body import JsonRoute
from vlm_server.middleware import request_facts, request_timings
from vlm_server.streaming import answer

router = APIRouter(route_class=JsonRoute, tags=["messages"])
models_router = APIRouter(prefix="/anthropic", tags=["models"])

_EXAMPLE = {"version": Example(value="2023-06-01")}

Version = Annotated[
    str, Header(alias="anthropic-version", min_length=1, openapi_examples=_EXAMPLE, description="Any; answers are those of 2023-06-01.")
]


@router.post("/v1/messages", response_model=MessageResponse, summary="Continue a conversation, as Anthropic's API")
async def messages(request: Request, body: MessagesRequest, anthropic_version: Version) -> Response:
    """Messages of text and pictures in, a message of content blocks out; with `stream`, as server-sent events."""
    context = context_of(request)
    warnings = check_fields(body, strict=context.config.strict_fields) + without_effect(body)
    abort = context.abortable(request, session_id=None)
    translation = translate(body)
    with _named(translation.names):
        response_id = f"msg_{uuid.uuid4().hex}"
        chat = await begin_chat(request, context, translation.chat, response_id=response_id, abort=abort)
        warnings += map(translation.names.in_warning, chat.warnings)
        extras, request_id = chat.report.fields(translation.names.of), request_facts(request.scope)["id"]
        report = request_timings(request.scope).report_if(body.return_timings)
        shape = MessageShape(body, response_id=response_id, request_id=request_id, warnings=warnings, extras=extras, report=report)
        return await answer(request, chat.generation, shape, streams=bool(body.stream), ping_s=context.config.sse_ping_s)


@router.post("/v1/messages/count_tokens", response_model=TokenCount, summary="The tokens of a conversation, pictures included")
async def count_message_tokens(request: Request, body: CountTokensRequest, anthropic_version: Version) -> Response:
    """As many as the same conversation's answer counts as its input. Pictures are measured by their headers."""
    context = context_of(request)
    warnings = check_fields(body, strict=context.config.strict_fields) + without_effect(body)
    translation = translate(body)
    with _named(translation.names):
        num_tokens, about_pictures = await count_tokens(request, context, translation.chat)
    warnings += map(translation.names.in_warning, about_pictures)
    return _json({"input_tokens": num_tokens} | ({"warnings": warnings} if warnings else {}))


@models_router.get("/v1/models", response_model=ModelInfoList, summary="What this server serves, as Anthropic's API")
async def list_anthropic_models(request: Request) -> Response:
    """One model, under the id that requests name."""
    return _json(model_list(context_of(request)))


@models_router.get("/v1/models/{model_id:path}", response_model=ModelInfo, summary="One model, as Anthropic's API")
async def retrieve_anthropic_model(request: Request, model_id: str) -> Response:
    """The same object as in the list; 404 for every other id."""
    return _json(model_info(context_of(request), model_id))


@contextlib.contextmanager
def _named(names: FieldNames) -> Iterator[None]:
    """Errors within name the client's fields."""
    try:
        yield
    except (ApiError, EngineError, MediaError) as error:
        raise names.in_error(to_api_error(error)) from error


def _json(content: dict[str, object]) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
