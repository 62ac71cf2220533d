"""`POST /v1/chat/completions`."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.request import Prompt
from vlm_server.answer_grammar import answer_grammar, check_calls
from vlm_server.auth import tenant_of
from vlm_server.context import ServerContext, Stopwatch, context_of
from vlm_server.guided import grammar_of
from vlm_server.middleware import request_timings
from vlm_server.protocol import ChatCompletionRequest
from vlm_server.response_schema import ChatCompletionResponse
from vlm_server.shapes import ChatShape, new_id
from vlm_server.stage_timings import StageTimings
from vlm_server.streaming import answer, unless_client_leaves
from vlm_server.tools import AnswerPlan, plan_answer

router = APIRouter()

_NUM_END_TOKENS = 16  # enough for the marker that opens the reasoning, at the prompt's end


@router.post("/v1/chat/completions", response_model=ChatCompletionResponse, tags=["chat"], summary="Continue a conversation")
async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
    """Messages of text and pictures in, an assistant message out; with `stream`, as server-sent events."""
    context = context_of(request)
    warnings = context.accept(request, body) + _without_effect(context, body)
    plan = plan_answer(body, context.formats)
    form = await grammar_of(body)
    tokenizer = context.backend.pipeline.tokenizer
    await check_calls(plan, tokenizer.added_token_id)
    watch = Stopwatch()
    timings = request_timings(request.scope)
    prompt = await unless_client_leaves(request, _prompt(context, body, plan, tenant_of(request.scope), timings))
    context.metrics.prompt_prepared(watch.elapsed_s)
    response_id = new_id("chatcmpl")
    prompt_end = tokenizer.decode(prompt.token_ids[-_NUM_END_TOKENS:], skip_special_tokens=False)
    in_reasoning = plan.begins_in_reasoning(prompt_end, body.continued_text())
    generation = context.generation(
        body,
        [prompt],
        grammar=answer_grammar(plan, form, token_id_of=tokenizer.added_token_id, in_reasoning=in_reasoning),
        request_id=response_id,
        decoder=tokenizer.showing(plan.markers) if plan.markers else None,
        new_parser=lambda: plan.parser(in_reasoning=in_reasoning),
    )
    shape = ChatShape(body, tokenizer, response_id=response_id, warnings=warnings, is_plain=plan.is_plain)
    return await answer(request, body, generation, shape, ping_s=context.config.sse_ping_s)


async def _prompt(context: ServerContext, body: ChatCompletionRequest, plan: AnswerPlan, tenant: str, timings: StageTimings) -> Prompt:
    if isinstance(body.messages, str):
        with timings.stage("tokenize"):
            return await context.text_prompt(body.messages, tenant=tenant)
    messages = [message.as_dict() for message in body.messages]
    return await context.backend.pipeline.chat_prompt(
        messages,
        tools=plan.template_tools(),
        template_kwargs=body.template_kwargs() or None,
        tenant=tenant,
        timings=timings,
        add_generation_prompt=body.adds_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
    )


def _without_effect(context: ServerContext, body: ChatCompletionRequest) -> list[str]:
    """Warnings for short names of template variables that the template does not have."""
    given = [name for name in ("enable_thinking", "reasoning_effort") if getattr(body, name) is not None]
    template = context.backend.pipeline.template.text
    return [f"{name}: the model's chat template has no such variable; it has no effect" for name in given if name not in template]
