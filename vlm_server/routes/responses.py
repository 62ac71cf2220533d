"""`/v1/responses`: create, retrieve, its input items, delete, cancel."""

from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Query, Request
from pydantic import ValidationError
from starlette.responses import Response as HttpResponse

from vlm_server.aborting import AbortSwitch
from vlm_server.auth import tenant_of
from vlm_server.chats import begin_chat
from vlm_server.context import ServerContext, context_of
from vlm_server.errors import ApiError, bad_request
from vlm_server.json_body import JsonRoute
from vlm_server.middleware import request_timings
from vlm_server.responses.items import ITEMS, AnyItem, as_given_back
from vlm_server.responses.records import KeptResponse, TooLargeError, new_response_id
from vlm_server.responses.request import INCLUDABLE, CreateResponse
from vlm_server.responses.schema import DeletedResponse, Response, ResponseItemList
from vlm_server.responses.shape import ResponseShape, response_head
from vlm_server.responses.translation import TranslatedChat, new_items, translated
from vlm_server.sessions.store import UnreadableRecordError
from vlm_server.streaming import answer

router = APIRouter(route_class=JsonRoute, tags=["responses"])

_encode = msgspec.json.Encoder().encode


def _check_query(request: Request) -> None:
    """Refuses what OpenAI's clients can ask of a kept response and have no effect here. Raises ApiError 400."""
    for name, value in request.query_params.multi_items():
        is_refused = {
            "include": value not in INCLUDABLE,  # what else it names is given in any case
            "include[]": value not in INCLUDABLE,
            "starting_after": True,
            "include_obfuscation": value != "false",
        }
        if is_refused.get(name):
            raise bad_request("unsupported_parameter", f"{name}: {value[:80]!r} is not supported", param=name)


@router.post("/v1/responses", response_model=Response, summary="Continue a conversation, and keep it")
async def create_response(request: Request, body: CreateResponse) -> HttpResponse:
    """Text, pictures and items in, output items out; with `stream`, as server-sent events."""
    context = context_of(request)
    warnings = context.accept(request, body)
    abort = context.abortable(request, session_id=None)
    earlier = await _conversation(context, tenant_of(request.scope), body.previous_response_id)
    chat = translated(body, _as_items(earlier), model=context.config.model_name)
    items = [*earlier, *map(as_given_back, new_items(body))]
    if body.is_stored:
        await _check_size(context, items)
    with chat.paths.named_in_errors():
        return await _answer(request, context, body, chat, items, warnings, abort=abort)


async def _answer(
    request: Request,
    context: ServerContext,
    body: CreateResponse,
    chat: TranslatedChat,
    items: list[dict[str, Any]],
    warnings: list[str],
    *,
    abort: AbortSwitch | None,
) -> HttpResponse:
    response_id, model = new_response_id(), context.config.model_name
    begun = await begin_chat(request, context, chat.request, response_id=response_id, abort=abort)
    all_warnings = dict.fromkeys([*warnings, *map(chat.paths.text, begun.warnings)])
    head = response_head(body, response_id=response_id, model=model, defaults=context.defaults)
    extras, tokenizer = begun.report.fields(chat.paths.of), context.backend.pipeline.tokenizer
    report = request_timings(request.scope).report_if(body.return_timings)
    shape = ResponseShape(head, tokenizer, warnings=list(all_warnings), paths=chat.paths, extras=extras, report=report)

    async def keep() -> None:
        final = shape.final or shape.finish(begun.generation.usage())
        await context.responses.keep(tenant_of(request.scope), KeptResponse(final, items))

    before_end = keep if body.is_stored else None
    ping_s = context.config.sse_ping_s
    return await answer(request, begun.generation, shape, streams=bool(body.stream), ping_s=ping_s, before_end=before_end)


@router.get(
    "/v1/responses/{response_id}", response_model=Response, summary="A response that was kept", dependencies=[Depends(_check_query)]
)
async def retrieve_response(request: Request, response_id: str, stream: bool = False) -> HttpResponse:
    """`stream` is for responses that are made in the background, which there are none of here."""
    if stream:
        raise bad_request("unsupported_parameter", "stream: a response is kept whole; only false is supported", param="stream")
    return _json((await _found(request, response_id)).response)


@router.delete("/v1/responses/{response_id}", response_model=DeletedResponse, summary="Forget a response")
async def delete_response(request: Request, response_id: str) -> HttpResponse:
    """Responses that went on from it stay, with the whole of their conversations."""
    if not await context_of(request).responses.delete(tenant_of(request.scope), response_id):
        raise _not_found("response_id", response_id)
    return _json({"id": response_id, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel", response_model=Response, summary="Always refused: nothing runs in the background")
async def cancel_response(request: Request, response_id: str) -> HttpResponse:
    """A running response ends when its client closes the connection."""
    if not await context_of(request).responses.has(tenant_of(request.scope), response_id):
        raise _not_found("response_id", response_id)
    raise bad_request("not_cancellable", "response_id: only responses with background: true can be cancelled", param="response_id")


@router.get(
    "/v1/responses/{response_id}/input_items",
    response_model=ResponseItemList,
    summary="What a response answered",
    dependencies=[Depends(_check_query)],
)
async def list_input_items(
    request: Request,
    response_id: str,
    after: str | None = None,
    limit: int = Query(20, ge=1, le=100),
    order: Literal["asc", "desc"] = "desc",
) -> HttpResponse:
    """The items of its conversation before it, those of earlier responses included; the newest first unless `order` is asc."""
    items = (await _found(request, response_id)).items
    ordered = items if order == "asc" else items[::-1]
    begin = 0
    if after is not None:
        begin = 1 + next((index for index, item in enumerate(ordered) if item["id"] == after), len(items))
        if begin > len(items):
            raise bad_request("invalid_value", "after: the id of no item of this response", param="after")
    page = ordered[begin : begin + limit]
    ends = {"first_id": page[0]["id"] if page else "", "last_id": page[-1]["id"] if page else ""}
    return _json({"object": "list", "data": page, **ends, "has_more": begin + limit < len(ordered)})


async def _conversation(context: ServerContext, tenant: str, response_id: str | None) -> list[dict[str, Any]]:
    """The items before a request's own. Raises UnreadableRecordError, or ApiError 404 where it is no response of the tenant's."""
    if response_id is None:
        return []
    kept = await context.responses.find(tenant, response_id, param="previous_response_id")
    if kept is None:
        raise _not_found("previous_response_id", response_id)
    return kept.conversation


def _as_items(kept: list[dict[str, Any]]) -> list[AnyItem]:
    try:
        return ITEMS.validate_python(kept)
    except ValidationError as error:
        message = "previous_response_id: the response was kept by another version of this server; send its conversation without it"
        raise UnreadableRecordError(message) from error


async def _check_size(context: ServerContext, items: list[dict[str, Any]]) -> None:
    try:
        await context.responses.check(items)
    except TooLargeError as error:
        message = f"input: {error} (--max-session-bytes); send less, or store: false"
        raise bad_request("conversation_too_large", message, param="input") from error


async def _found(request: Request, response_id: str) -> KeptResponse:
    kept = await context_of(request).responses.find(tenant_of(request.scope), response_id)
    if kept is None:
        raise _not_found("response_id", response_id)
    return kept


def _not_found(param: str, response_id: str) -> ApiError:
    code = "previous_response_not_found" if param == "previous_response_id" else "response_not_found"
    message = f"{param}: there is no response {response_id[:80]!r}; it was not stored, has ended, or is another key's"
    return ApiError(404, code, message, param=param)


def _json(content: dict[str, Any]) -> HttpResponse:
    return HttpResponse(_encode(content), media_type="application/json")
