"""`POST /v1/chat/completions`."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.request import Prompt
from vlm_server.auth import tenant_of
from vlm_server.context import ServerContext, Stopwatch, context_of
from vlm_server.guided import grammar_of
from vlm_server.middleware import request_timings
from vlm_server.protocol import ChatCompletionRequest
from vlm_server.response_schema import ChatCompletionResponse
from vlm_server.shapes import ChatShape, new_id
from vlm_server.stage_timings import StageTimings
from vlm_server.streaming import answer, unless_client_leaves

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletionResponse, tags=["chat"], summary="Continue a conversation")
async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
    """Messages of text and pictures in, an assistant message out; with `stream`, as server-sent events."""
    context = context_of(request)
    warnings = context.accept(request, body)
    grammar = await grammar_of(body)
    watch = Stopwatch()
    prompt = await unless_client_leaves(request, _prompt(context, body, tenant_of(request.scope), request_timings(request.scope)))
    context.metrics.prompt_prepared(watch.elapsed_s)
    response_id = new_id("chatcmpl")
    generation = context.generation(body, [prompt], grammar=grammar, request_id=response_id)
    shape = ChatShape(body, context.backend.pipeline.tokenizer, response_id=response_id, warnings=warnings)
    return await answer(request, body, generation, shape, ping_s=context.config.sse_ping_s)


async def _prompt(context: ServerContext, body: ChatCompletionRequest, tenant: str, timings: StageTimings) -> Prompt:
    if isinstance(body.messages, str):
        with timings.stage("tokenize"):
            return await context.text_prompt(body.messages, tenant=tenant)
    messages = [message.as_dict() for message in body.messages]
    template_kwargs = body.template_kwargs() or None
    return await context.backend.pipeline.chat_prompt(messages, template_kwargs=template_kwargs, tenant=tenant, timings=timings)
