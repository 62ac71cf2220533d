"""`POST /v1/completions`."""

from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.request import InvalidRequestError, Prompt
from vlm_server.aborting import unless_aborted
from vlm_server.auth import tenant_of
from vlm_server.context import ServerContext, Stopwatch, context_of
from vlm_server.echo import Echo, echo_of
from vlm_server.errors import bad_request, to_api_error
from vlm_server.generation import NO_PROMPT
from vlm_server.guided import grammar_of
from vlm_server.infill import InfillFormat, infill_end_ids, infill_format, infill_tokens
from vlm_server.json_body import JsonRoute
from vlm_server.middleware import request_timings
from vlm_server.protocol import CompletionRequest
from vlm_server.response_schema import CompletionResponse
from vlm_server.shapes import CompletionShape, new_id
from vlm_server.streaming import answer, unless_client_leaves

router = APIRouter(route_class=JsonRoute)

MAX_ECHOED_LOGPROBS = 1 << 20  # 30 MB of JSON; 16 prompts of 32k tokens, each with the likeliest one beside it


@router.post("/v1/completions", response_model=CompletionResponse, tags=["completions"], summary="Continue a text")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Text or token ids in, text out, without a chat template. Answers to several prompts are numbered in the prompts' order."""
    context = context_of(request)
    warnings = context.accept(request, body)
    abort = context.abortable(request, body.session_id)
    _check(body)
    infill = _infill_format(context, body) if body.suffix else None
    grammar = await unless_client_leaves(request, grammar_of(body, context.backend.grammars))
    watch = Stopwatch()
    with request_timings(request.scope).stage("tokenize"):
        work = _prompts(context, body, infill, tenant_of(request.scope))
        no_prompts = [NO_PROMPT for _ in body.prompts()]
        prompts = await unless_client_leaves(request, unless_aborted(abort, work, instead=no_prompts))
    _check_echo(body, prompts)
    context.metrics.prompt_prepared(watch.elapsed_s)
    response_id = new_id("cmpl")
    ends = infill_end_ids(infill, context.backend.pipeline.tokenizer) if infill is not None else ()
    generation = context.generation(body, prompts, grammar=grammar, stop_token_ids=ends, request_id=response_id, abort=abort)
    echoes = await context.backend.pipeline.in_thread(lambda: _echoes(context, body, prompts)) if body.echo else []
    tokenizer, report = context.backend.pipeline.tokenizer, request_timings(request.scope).report_if(body.return_timings)
    shape = CompletionShape(body, tokenizer, response_id=response_id, warnings=warnings, echoes=echoes, report=report)
    return await answer(request, generation, shape, streams=bool(body.stream), ping_s=context.config.sse_ping_s)


def _check(body: CompletionRequest) -> None:
    """Raises ApiError 400 for what fields ask for together and cannot have."""
    if body.max_tokens == 0 and not body.max_completion_tokens and not body.echo:
        raise bad_request("invalid_value", "max_tokens: at least 1, or 0 with echo: true, which gives the prompt alone", param="max_tokens")


def _check_echo(body: CompletionRequest, prompts: list[Prompt]) -> None:
    """Raises ApiError 400 for prompts whose log probabilities would be out of proportion."""
    num_others = body.num_prompt_logprobs
    if num_others is None:
        return
    num_logprobs = sum(len(prompt.token_ids) for prompt in prompts) * body.num_choices * (1 + num_others)
    if num_logprobs > MAX_ECHOED_LOGPROBS:
        asked = f"{num_logprobs} log probabilities of echoed prompts (their tokens × n × (1 + logprobs))"
        raise bad_request("invalid_value", f"logprobs: {asked}; at most {MAX_ECHOED_LOGPROBS} are allowed", param="logprobs")


def _echoes(context: ServerContext, body: CompletionRequest, prompts: list[Prompt]) -> list[Echo]:
    tokenizer, skips = context.backend.pipeline.tokenizer, body.skip_special_tokens is not False
    return [echo_of(given, prompt, tokenizer, skip_special_tokens=skips) for given, prompt in zip(body.prompts(), prompts, strict=True)]


def _infill_format(context: ServerContext, body: CompletionRequest) -> InfillFormat:
    """How the model is asked for what is before a suffix. Raises ApiError 400."""
    infill = infill_format(context.backend.pipeline.tokenizer)
    if infill is None:
        message = "suffix: this model's tokenizer has no tokens for text between a prompt and a suffix"
        raise bad_request("unsupported_parameter", message, param="suffix")
    if body.echo:
        raise bad_request("invalid_value", "suffix: only without echo, since the prompt is then not what the model reads", param="suffix")
    if not all(isinstance(prompt, str) for prompt in body.prompts()):
        raise bad_request("invalid_value", "suffix: only with prompts that are text", param="suffix")
    return infill


async def _prompts(context: ServerContext, body: CompletionRequest, infill: InfillFormat | None, tenant: str) -> list[Prompt]:
    given = body.prompts()
    if infill is not None:
        pipeline, suffix = context.backend.pipeline, body.suffix or ""
        writing = [partial(infill_tokens, infill, str(prefix), suffix, pipeline.tokenizer) for prefix in given]
        given = [await pipeline.in_thread(write) for write in writing]
    try:
        return [await context.text_prompt(prompt, tenant=tenant) for prompt in given]
    except InvalidRequestError as error:
        raise to_api_error(error, param=body.input_field) from error
