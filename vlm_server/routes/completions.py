"""`POST /v1/completions`."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.request import Prompt
from vlm_server.auth import tenant_of
from vlm_server.context import ServerContext, Stopwatch, context_of
from vlm_server.guided import grammar_of
from vlm_server.middleware import request_timings
from vlm_server.protocol import CompletionRequest
from vlm_server.response_schema import CompletionResponse
from vlm_server.shapes import CompletionShape, new_id
from vlm_server.streaming import answer, unless_client_leaves

router = APIRouter()


@router.post("/v1/completions", response_model=CompletionResponse, tags=["completions"], summary="Continue a text")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Text or token ids in, text out, without a chat template. Answers to several prompts are numbered in the prompts' order."""
    context = context_of(request)
    warnings = context.accept(request, body)
    grammar = await grammar_of(body)
    watch = Stopwatch()
    with request_timings(request.scope).stage("tokenize"):
        prompts = await unless_client_leaves(request, _prompts(context, body, tenant_of(request.scope)))
    context.metrics.prompt_prepared(watch.elapsed_s)
    response_id = new_id("cmpl")
    generation = context.generation(body, prompts, grammar=grammar, request_id=response_id)
    shape = CompletionShape(body, context.backend.pipeline.tokenizer, response_id=response_id, warnings=warnings)
    return await answer(request, generation, shape, streams=bool(body.stream), ping_s=context.config.sse_ping_s)


async def _prompts(context: ServerContext, body: CompletionRequest, tenant: str) -> list[Prompt]:
    return [await context.text_prompt(prompt, tenant=tenant) for prompt in body.prompts()]
