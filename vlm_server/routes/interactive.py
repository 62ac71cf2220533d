"""`POST /v1/chat/interactive`: LMDeploy's route for conversations that the server keeps.

A stream is one JSON object per line, without `data: ` and without an end mark, under the media type that LMDeploy gave it.
"""

import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.request import Prompt
from vlm_server.auth import tenant_of
from vlm_server.context import ServerContext, context_of
from vlm_server.errors import bad_request, to_api_error
from vlm_server.generation import Generation
from vlm_server.interactive_protocol import NO_SESSION, GenerateRequest
from vlm_server.json_body import JsonRoute
from vlm_server.middleware import request_facts, request_timings
from vlm_server.picture_report import PictureReport
from vlm_server.response_schema import InteractiveResponse
from vlm_server.sessions.store import RecordId
from vlm_server.shapes import new_id
from vlm_server.stage_timings import Report, StageTimings, no_report
from vlm_server.streaming import UNFINISHED, EventStream, note_usage, unless_client_leaves
from vlm_server.turns import Reply, TurnRequest
from vlm_server.waiting_room import enter_waiting_room

logger = logging.getLogger(__name__)

router = APIRouter(route_class=JsonRoute)

_encode = msgspec.json.Encoder().encode
_NOTHING = Reply(finish_reason="stop")  # what cancelling and ending answer


@router.post("/v1/chat/interactive", response_model=InteractiveResponse, tags=["chat"], summary="One turn of a session")
async def chat_interactive(request: Request, body: GenerateRequest) -> Response:
    """The user's turn in, the assistant's out; with `interactive_mode` and a `session_id` the server keeps both for the next turn."""
    context = context_of(request)
    warnings = context.accept(request, body) + _check(body)
    session_id = _session_of(context, request, body)
    if body.cancel or body.ends_session:
        if session_id is not None:
            turns = context.turns
            await unless_client_leaves(request, turns.cancel(session_id) if body.cancel else turns.end(session_id))
        return Response(_Shown(warnings).line(_NOTHING), media_type="text/event-stream" if body.stream else "application/json")
    enter_waiting_room(request.scope)
    messages, tenant = body.new_messages(), tenant_of(request.scope)
    timings, report = request_timings(request.scope), PictureReport.of(body.on_media_error, body.return_image_sizes)
    report.params = {path for _, _, path in body.picture_fields()}  # those of earlier turns are the session's
    files = {}
    if uploaded := list(_uploaded(body, messages)):
        with timings.stage("files"):
            taking = context.files.take(uploaded, tenant=tenant, lost=report.lost if report.may_fail else None)
            files = await unless_client_leaves(request, taking)
    begun: list[Generation] = []  # the turn's, as soon as there is one
    replies = context.turns.replies(_turn_request(context, body, messages, files, tenant, session_id, timings, report, begun))
    shown = _Shown(warnings, timings.report_if(body.return_timings), report)
    if body.stream:
        return await _stream(request, replies, shown, begun)
    return Response(shown.line(await _collected(request, replies, begun)), media_type="application/json")


def _check(body: GenerateRequest) -> list[str]:
    """Warnings. Raises ApiError 400 for what fields ask for together and cannot have."""
    if body.cancel:
        if body.session_id == NO_SESSION:
            raise bad_request("missing_required_parameter", "session_id: it is needed to cancel a request", param="session_id")
        return []
    if body.turn is None:
        raise bad_request("missing_required_parameter", "prompt: it is needed, as a string or as messages", param="prompt")
    if body.request_output_len == 0 and not body.ends_session:
        message = "request_output_len: at least 1, or 0 with an empty prompt and without interactive_mode, which ends the session"
        raise bad_request("invalid_value", message, param="request_output_len")
    if body.interactive_mode and body.session_id == NO_SESSION:
        return ["interactive_mode: without a session_id nothing is kept"]
    return []


def _session_of(context: ServerContext, request: Request, body: GenerateRequest) -> RecordId | None:
    if body.session_id == NO_SESSION:
        return None
    return context.turns.sessions.id_of(tenant_of(request.scope), body.session_id)


def _uploaded(body: GenerateRequest, messages: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pictures that are named by a file id, under the names of the fields that the client knows."""
    for number, index, path in body.picture_fields():
        image = messages[number]["content"][index]["image_url"]
        if "file_id" in image:
            yield path, image


def _turn_request(
    context: ServerContext,
    body: GenerateRequest,
    messages: list[dict[str, Any]],
    files: dict[str, bytes],
    tenant: str,
    session_id: RecordId | None,
    timings: StageTimings,
    report: PictureReport,
    begun: list[Generation],
) -> TurnRequest:
    fields, response_id = body.turn_fields(context.config.model_name), new_id("interactive")

    def generation(prompt: Prompt) -> Generation:
        begun.append(context.generation(fields, [prompt], request_id=response_id))
        return begun[-1]

    return TurnRequest(
        tenant=tenant,
        session_id=session_id,
        keeps=body.interactive_mode,
        messages=messages,
        pictures=tuple(body.picture_fields()),
        files=files,
        generation=generation,
        report=report,
        prompt_prepared=context.metrics.prompt_prepared,
        timings=timings,
    )


async def _collected(request: Request, replies: AsyncGenerator[Reply, None], begun: list[Generation]) -> Reply:
    """All replies as one. Raises what the turn raises, and ApiError 499 where the client left."""

    pieces, last = [], Reply()

    async def collect() -> Reply:
        nonlocal last
        async with aclosing(replies):
            async for last in replies:
                pieces.append(last.text)
        return Reply("".join(pieces), last.usage, last.history_tokens, last.finish_reason)

    try:
        return await unless_client_leaves(request, collect())
    finally:
        _note(request, last, begun)


async def _stream(request: Request, replies: AsyncGenerator[Reply, None], shown: "_Shown", begun: list[Generation]) -> Response:
    """The answer in lines, begun. Raises what the turn raises before its first piece."""
    try:
        first = await unless_client_leaves(request, anext(replies))
    except BaseException:
        await replies.aclose()
        _note(request, Reply(), begun)
        raise
    return EventStream(_lines(request, first, replies, shown, begun), replies, ping_s=0)  # a comment would be no JSON


async def _lines(
    request: Request, first: Reply, replies: AsyncGenerator[Reply, None], shown: "_Shown", begun: list[Generation]
) -> AsyncGenerator[bytes, None]:
    last = first
    try:
        async with aclosing(replies):
            yield shown.line(first)
            async for last in replies:
                yield shown.line(last)
    except Exception as error:  # the status is sent already: the error becomes the last line
        api_error = to_api_error(error)
        if api_error.code == "internal_error":
            logger.exception("a stream failed")
        request_facts(request.scope)["error"] = api_error.code
        failed = Reply(usage=last.usage, history_tokens=last.history_tokens, finish_reason="error")
        yield _encode(shown.as_dict(failed) | {"error": api_error.body()["error"]}) + b"\n"
    finally:
        _note(request, last, begun)


def _note(request: Request, last: Reply, begun: list[Generation]) -> None:
    """What the turn cost, for the log; nothing of one that was refused before its answer was begun."""
    if begun or last.finish_reason:
        note_usage(request, begun[-1].usage() if begun else last.usage)
        request_facts(request.scope)["finish_reason"] = last.finish_reason or UNFINISHED


@dataclass(frozen=True, slots=True)
class _Shown:
    """How a turn's replies are written: in the last one with warnings, timings, and what became of its pictures."""

    warnings: list[str]
    report: Report = no_report
    pictures: PictureReport = field(default_factory=PictureReport)

    def line(self, reply: Reply) -> bytes:
        return _encode(self.as_dict(reply)) + b"\n"

    def as_dict(self, reply: Reply) -> dict[str, Any]:
        """LMDeploy's object."""
        last = self._last() if reply.finish_reason else {}
        return {
            "text": reply.text,
            "tokens": reply.usage.completion_tokens,
            "input_tokens": reply.usage.prompt_tokens - reply.history_tokens,
            "history_tokens": reply.history_tokens,
            "finish_reason": reply.finish_reason,
            **last,
        }

    def _last(self) -> dict[str, Any]:
        warnings = self.warnings + self.pictures.warnings()
        return {**({"warnings": warnings} if warnings else {}), **self.pictures.fields(), **self.report()}
