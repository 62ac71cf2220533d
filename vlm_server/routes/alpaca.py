"""`--compat alpaca`: chats, completions and embeddings for Chinese-LLaMA-Alpaca's clients, in the place of OpenAI's three routes."""

from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from vlm_server.aborting import unless_aborted
from vlm_server.alpaca import TASK, Turn, chat_prompt, completion_prompt
from vlm_server.alpaca_protocol import (
    AlpacaChatRequest,
    AlpacaChatResponse,
    AlpacaCompletionRequest,
    AlpacaCompletionResponse,
    AlpacaEmbeddingsRequest,
    AlpacaEmbeddingsResponse,
    AlpacaFields,
)
from vlm_server.alpaca_shapes import AlpacaChatShape, AlpacaCompletionShape
from vlm_server.auth import tenant_of
from vlm_server.context import ServerContext, Stopwatch, context_of
from vlm_server.embedding_protocol import EmbeddingsRequest
from vlm_server.field_rules import check_fields
from vlm_server.generation import NO_PROMPT, Generation
from vlm_server.guided import grammar_of
from vlm_server.json_body import JsonRoute
from vlm_server.middleware import request_facts, request_timings
from vlm_server.protocol import ChatCompletionRequest, CompletionRequest
from vlm_server.request_limits import check_limits
from vlm_server.routes.embeddings import embed_all
from vlm_server.shapes import new_id
from vlm_server.streaming import answer, unless_client_leaves

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions", response_model=AlpacaChatResponse, tags=["chat"], summary="Answer the last message")
async def chat_completions(request: Request, body: AlpacaChatRequest) -> Response:
    """Messages in, all of them and an answer out; with `stream`, the answer alone as server-sent events."""
    context = context_of(request)
    check_limits(body, context.config.limits)
    warnings = check_fields(body, strict=context.config.strict_fields) + _left_out(body.turns)
    given_task = context.config.meta_instruction
    text = chat_prompt(body.turns, task=TASK if given_task is None else given_task)
    response_id = new_id("chatcmpl")
    chat = body.filled(ChatCompletionRequest, model=context.config.model_name, messages=text)
    generation = await _begin(request, context, chat, text, response_id)
    shape = AlpacaChatShape(body.turns, **_naming(request, context, body, response_id, warnings))
    return await answer(request, generation, shape, streams=bool(body.stream), ping_s=context.config.sse_ping_s)


@router.post("/v1/completions", response_model=AlpacaCompletionResponse, tags=["completions"], summary="Follow an instruction")
async def completions(request: Request, body: AlpacaCompletionRequest) -> Response:
    """An instruction in, the response out; with `stream`, as server-sent events."""
    context = context_of(request)
    warnings = check_fields(body, strict=context.config.strict_fields)
    text = completion_prompt(body.prompt)
    response_id = new_id("cmpl")
    completion = body.filled(CompletionRequest, model=context.config.model_name, prompt=text)
    generation = await _begin(request, context, completion, text, response_id)
    shape = AlpacaCompletionShape(**_naming(request, context, body, response_id, warnings))
    return await answer(request, generation, shape, streams=bool(body.stream), ping_s=context.config.sse_ping_s)


@router.post("/v1/embeddings", response_model=AlpacaEmbeddingsResponse, tags=["embeddings"], summary="Texts as vectors")
async def embeddings(request: Request, body: AlpacaEmbeddingsRequest) -> Response:
    """One item: of one input its vector, of several a list of theirs."""
    context = context_of(request)
    warnings = check_fields(body, strict=context.config.strict_fields)
    plain = EmbeddingsRequest.model_validate({"input": body.input})
    context.accept(request, plain)
    embedded = await unless_client_leaves(request, embed_all(context, plain, tenant_of(request.scope)))
    request_facts(request.scope).update(prompt_tokens=sum(count for _, count in embedded))
    vectors = [vector.tolist() for vector, _ in embedded]
    content: dict[str, Any] = {
        "object": "list",
        "data": [{"object": "embedding", "embedding": vectors[0] if len(vectors) == 1 else vectors, "index": 0}],
        "model": context.config.model_name,
    }
    if warnings:
        content["warnings"] = warnings
    return Response(msgspec.json.encode(content), media_type="application/json")


async def _begin(
    request: Request, context: ServerContext, body: ChatCompletionRequest | CompletionRequest, text: str, response_id: str
) -> Generation:
    """The answers to a prompt that is written already. They are text alone: Alpaca's models mark neither calls nor reasoning."""
    context.accept(request, body)
    abort = context.abortable(request, body.session_id)
    grammar = await unless_client_leaves(request, grammar_of(body, context.backend.grammars))
    watch = Stopwatch()
    with request_timings(request.scope).stage("tokenize"):
        work = context.text_prompt(text, tenant=tenant_of(request.scope))
        prompt = await unless_client_leaves(request, unless_aborted(abort, work, instead=NO_PROMPT))
    context.metrics.prompt_prepared(watch.elapsed_s)
    return context.generation(body, [prompt], grammar=grammar, request_id=response_id, abort=abort)


def _naming(request: Request, context: ServerContext, body: AlpacaFields, response_id: str, warnings: list[str]) -> dict[str, Any]:
    return {
        "model": context.config.model_name,
        "response_id": response_id,
        "includes_usage": body.includes_usage,
        "warnings": warnings,
        "report": request_timings(request.scope).report_if(body.return_timings),
    }


def _left_out(turns: list[Turn]) -> list[str]:
    """Warnings for messages that the prompt has no words for."""
    return [
        f"messages[{index}].role: Alpaca's template has no words for {turn.role!r}; the message is not in the prompt"
        for index, turn in enumerate(turns)
        if not turn.is_known
    ]
