"""`POST /get_ppl`: how likely a text is, as LMDeploy measures it; and `POST /pooling`, for which no model here has the head."""

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.request import Prompt, SamplingParams
from vlm_server.auth import tenant_of
from vlm_server.context import ServerContext, context_of
from vlm_server.errors import ApiError, bad_request
from vlm_server.json_body import JsonRoute
from vlm_server.middleware import request_facts
from vlm_server.response_schema import PerplexityResponse
from vlm_server.shapes import new_id
from vlm_server.streaming import unless_client_leaves
from vlm_server.token_protocol import PerplexityRequest, PoolingRequest

router = APIRouter(route_class=JsonRoute, tags=["tokens"])

_PARAMS = SamplingParams(max_tokens=0, prompt_logprobs=0)


@router.post("/get_ppl", response_model=PerplexityResponse, summary="The mean cross-entropy of a text")
async def get_ppl(request: Request, body: PerplexityRequest) -> Response:
    """Over all tokens but the first, in nats: not raised to a power, whatever the name says."""
    context = context_of(request)
    warnings = context.accept(request, body)
    prompt = await context.text_prompt(body.input, tenant=tenant_of(request.scope))
    if len(prompt.token_ids) < 2:
        raise bad_request("invalid_value", "input: at least 2 tokens are needed", param="input")
    entropy = await unless_client_leaves(request, _cross_entropy(context, prompt))
    request_facts(request.scope).update(prompt_tokens=len(prompt.token_ids))
    return Response(msgspec.json.encode({"ppl": entropy} | ({"warnings": warnings} if warnings else {})), media_type="application/json")


@router.post("/pooling", summary="A reward model's score", response_class=Response)
async def pooling(request: Request, body: PoolingRequest) -> Response:
    """No model that this server runs has a reward head yet: always an error that says so."""
    context_of(request).accept(request, body)
    raise bad_request(
        "unsupported_model", "this model has no reward head; /v1/embeddings gives the mean of its hidden states", param="model"
    )


async def _cross_entropy(context: ServerContext, prompt: Prompt) -> float:
    async for output in context.backend.engine.generate(prompt, _PARAMS, request_id=new_id("ppl")):
        context.metrics.stages_measured(output.timings_s or {})
        if output.prompt_logprobs is not None:
            return -sum(scored.logprob for scored in output.prompt_logprobs) / len(output.prompt_logprobs)
    raise ApiError(500, "engine_error", output.error or "the engine gave no log-probabilities")
