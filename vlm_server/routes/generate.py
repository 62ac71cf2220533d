"""`POST /generate`: tokens in, tokens out, as LMDeploy's clients for training ask for it."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.request import InvalidRequestError, Prompt
from vlm_server.aborting import unless_aborted
from vlm_server.auth import tenant_of
from vlm_server.context import ServerContext, Stopwatch, context_of
from vlm_server.errors import bad_request, to_api_error
from vlm_server.generate_protocol import GenerateReqInput
from vlm_server.generate_shape import GenerateShape
from vlm_server.generation import NO_PROMPT
from vlm_server.guided import grammar_of
from vlm_server.json_body import JsonRoute
from vlm_server.middleware import request_timings
from vlm_server.picture_report import PictureReport
from vlm_server.response_schema import GenerateReqOutput
from vlm_server.shapes import new_id
from vlm_server.streaming import answer, unless_client_leaves

router = APIRouter(route_class=JsonRoute)


@router.post("/generate", response_model=GenerateReqOutput, tags=["completions"], summary="Continue a text or token ids, with pictures")
async def generate(request: Request, body: GenerateReqInput) -> Response:
    """One answer with its token ids, and with `return_logprob` their log probabilities, without a chat template.

    Pictures stand at the model's placeholders in the prompt where there are as many, else before the text.
    """
    context = context_of(request)
    warnings = context.accept(request, body)
    abort = context.abortable(request, body.session_id)
    grammar = await unless_client_leaves(request, grammar_of(body, context.backend.grammars))
    watch = Stopwatch()
    report = PictureReport.of(body.on_media_error, body.return_image_sizes)
    work = _prompt(request, context, body, report)
    prompt = await unless_client_leaves(request, unless_aborted(abort, work, instead=NO_PROMPT))
    context.metrics.prompt_prepared(watch.elapsed_s)
    generation = context.generation(body, [prompt], grammar=grammar, request_id=new_id("gen"), abort=abort)
    shape = GenerateShape(
        num_prompt_tokens=len(prompt.token_ids),
        returns_logprob=bool(body.return_logprob),
        warnings=warnings + report.warnings(),
        extras=report.fields(),
        report=request_timings(request.scope).report_if(body.return_timings),
    )
    return await answer(request, generation, shape, streams=bool(body.stream), ping_s=context.config.sse_ping_s)


async def _prompt(request: Request, context: ServerContext, body: GenerateReqInput, report: PictureReport) -> Prompt:
    timings, tenant = request_timings(request.scope), tenant_of(request.scope)
    pictures, fields = body.pictures(), body.picture_fields()
    _check_ids(context, body)
    if pictures:
        pipeline = context.backend.pipeline
        return await pipeline.picture_prompt(body.text_or_ids, pictures, params=fields, tenant=tenant, timings=timings, report=report)
    with timings.stage("tokenize"):
        try:
            return await context.text_prompt(body.text_or_ids, tenant=tenant)
        except InvalidRequestError as error:  # which calls every input a prompt
            message = str(error).removeprefix("prompt: ")
            raise bad_request("invalid_value", f"{body.input_field}: {message}", param=body.input_field) from error


def _check_ids(context: ServerContext, body: GenerateReqInput) -> None:
    if not isinstance(body.text_or_ids, str):
        try:
            context.check_token_ids(body.text_or_ids)
        except InvalidRequestError as error:
            raise to_api_error(error, param=body.input_field) from error
