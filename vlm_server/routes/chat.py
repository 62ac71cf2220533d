"""`POST /v1/chat/completions`."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from vlm_server.chats import begin_chat
from vlm_server.context import context_of
from vlm_server.json_body import JsonRoute
from vlm_server.middleware import request_timings
from vlm_server.protocol import ChatCompletionRequest
from vlm_server.response_schema import ChatCompletionResponse
from vlm_server.shapes import ChatShape, new_id
from vlm_server.streaming import answer

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions", response_model=ChatCompletionResponse, tags=["chat"], summary="Continue a conversation")
async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
    """Messages of text and pictures in, an assistant message out; with `stream`, as server-sent events."""
    context = context_of(request)
    response_id = new_id("chatcmpl")
    abort = context.abortable(request, body.session_id)
    chat = await begin_chat(request, context, body, response_id=response_id, abort=abort)
    tokenizer = context.backend.pipeline.tokenizer
    extras, report = chat.report.fields(), request_timings(request.scope).report_if(body.return_timings)
    is_plain, warnings = chat.is_plain, chat.warnings
    shape = ChatShape(body, tokenizer, response_id=response_id, warnings=warnings, is_plain=is_plain, extras=extras, report=report)
    return await answer(request, chat.generation, shape, streams=bool(body.stream), ping_s=context.config.sse_ping_s)
