"""`POST /v1/completions`."""

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.request import Prompt
from vlm_server.auth import tenant_of
from vlm_server.context import ServerContext, Stopwatch, context_of
from vlm_server.echo import Echo, echo_of
from vlm_server.errors import bad_request
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
    _check(body)
    grammar = await grammar_of(body)
    watch = Stopwatch()
    with request_timings(request.scope).stage("tokenize"):
        prompts = await unless_client_leaves(request, _prompts(context, body, tenant_of(request.scope)))
    context.metrics.prompt_prepared(watch.elapsed_s)
    response_id = new_id("cmpl")
    generation = context.generation(body, prompts, grammar=grammar, request_id=response_id)
    echoes = await asyncio.to_thread(_echoes, context, body, prompts) if body.echo else []
    shape = CompletionShape(body, context.backend.pipeline.tokenizer, response_id=response_id, warnings=warnings, echoes=echoes)
    return await answer(request, generation, shape, streams=bool(body.stream), ping_s=context.config.sse_ping_s)


def _check(body: CompletionRequest) -> None:
    """Raises ApiError 400 for what fields ask for together and cannot have."""
    if body.max_tokens == 0 and not body.max_completion_tokens and not body.echo:
        raise bad_request("invalid_value", "max_tokens: at least 1, or 0 with echo: true, which gives the prompt alone", param="max_tokens")


def _echoes(context: ServerContext, body: CompletionRequest, prompts: list[Prompt]) -> list[Echo]:
    tokenizer, skips = context.backend.pipeline.tokenizer, body.skip_special_tokens is not False
    return [echo_of(given, prompt, tokenizer, skip_special_tokens=skips) for given, prompt in zip(body.prompts(), prompts, strict=True)]


async def _prompts(context: ServerContext, body: CompletionRequest, tenant: str) -> list[Prompt]:
    return [await context.text_prompt(prompt, tenant=tenant) for prompt in body.prompts()]
