"""`POST /v1/embeddings`: texts and pictures as the normalised mean of the model's last hidden states."""

import asyncio
import base64
from contextlib import aclosing
from typing import Any

import msgspec
import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.request import InvalidRequestError, Prompt, SamplingParams
from vision.request_room import RequestRoom
from vlm_server.auth import tenant_of
from vlm_server.context import ServerContext, context_of
from vlm_server.embedding_protocol import EmbeddingsRequest
from vlm_server.errors import ApiError, bad_request, to_api_error
from vlm_server.files import images_in_parts
from vlm_server.json_body import JsonRoute
from vlm_server.middleware import request_facts
from vlm_server.response_schema import EmbeddingsResponse
from vlm_server.shapes import new_id
from vlm_server.stage_timings import StageTimings
from vlm_server.streaming import unless_client_leaves

router = APIRouter(route_class=JsonRoute)

NUM_AT_ONCE = 32  # of one request's items in the engine's queue
_PARAMS = SamplingParams(max_tokens=0, pools=True)


@router.post("/v1/embeddings", response_model=EmbeddingsResponse, tags=["embeddings"], summary="Texts and pictures as vectors")
async def embeddings(request: Request, body: EmbeddingsRequest) -> Response:
    """One vector of length 1 per input: the mean over all its tokens, those of pictures too."""
    context = context_of(request)
    warnings = context.accept(request, body)
    _check_dimensions(body, context.engine_info.hidden_size)
    embedded = await unless_client_leaves(request, embed_all(context, body, tenant_of(request.scope)))
    num_tokens = sum(count for _, count in embedded)
    request_facts(request.scope).update(prompt_tokens=num_tokens)
    content: dict[str, Any] = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _written(vector, body.encoding_format)}
            for index, (vector, _) in enumerate(embedded)
        ],
        "model": context.config.model_name,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    if warnings:
        content["warnings"] = warnings
    return Response(msgspec.json.encode(content), media_type="application/json")


def _check_dimensions(body: EmbeddingsRequest, hidden_size: int) -> None:
    if body.dimensions not in (None, hidden_size):
        message = f"dimensions: only {hidden_size}, the model's own, is allowed: its embeddings cannot be shortened"
        raise bad_request("invalid_value", message, param="dimensions")


async def embed_all(context: ServerContext, body: EmbeddingsRequest, tenant: str) -> list[tuple[np.ndarray, int]]:
    """Vector and number of tokens of each item. An error of one ends the others."""
    slots = asyncio.Semaphore(NUM_AT_ONCE)
    room = context.backend.pipeline.request_room()

    async def embed(path: str, item: str | list[int] | list[dict[str, Any]]) -> tuple[np.ndarray, int]:
        async with slots:
            prompt = await _prompt(context, path, item, tenant, room)
            return await _vector(context, prompt, path), len(prompt.token_ids)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(embed(path, item)) for path, item in body.items()]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _prompt(
    context: ServerContext, path: str, item: str | list[int] | list[dict[str, Any]], tenant: str, room: RequestRoom | None
) -> Prompt:
    try:
        match item:
            case [dict(), *_] as parts:
                return await _parts_prompt(context, parts, path, tenant, room)  # type: ignore[arg-type]
            case _:
                return await context.text_prompt(item, tenant=tenant)  # type: ignore[arg-type]
    except InvalidRequestError as error:
        raise _named(error, path) from error


async def _parts_prompt(context: ServerContext, parts: list[dict[str, Any]], path: str, tenant: str, room: RequestRoom | None) -> Prompt:
    pictures = await context.files.take(images_in_parts(parts, path), tenant=tenant)
    timings = StageTimings(observer=context.metrics)
    pipeline = context.backend.pipeline
    return await pipeline.parts_prompt(parts, param=path, tenant=tenant, pictures=pictures, timings=timings, room=room)


async def _vector(context: ServerContext, prompt: Prompt, path: str) -> np.ndarray:
    """(hidden_size,) float32, of length 1."""
    async with aclosing(context.backend.engine.generate(prompt, _PARAMS, request_id=new_id("embd"))) as outputs:
        try:
            async for output in outputs:
                context.metrics.stages_measured(output.timings_s or {})
                if output.embedding is not None:
                    vector = np.asarray(output.embedding)
                    return np.asarray(vector / max(np.linalg.norm(vector), 1e-12), np.float32)
        except InvalidRequestError as error:
            raise _named(error, path) from error
        finally:
            prompt.close()
    raise ApiError(500, "engine_error", output.error or "the engine gave no embedding")


def _named(error: InvalidRequestError, path: str) -> ApiError:
    """The error of one item, under that item's name."""
    api_error = to_api_error(error, param=path)
    return api_error if (api_error.param or "").startswith("input") else bad_request(api_error.code, str(error), param=path)


def _written(vector: np.ndarray, encoding_format: str | None) -> list[float] | str:
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(number) for number in vector]
