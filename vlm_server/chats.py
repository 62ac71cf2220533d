"""A chat request on its way from fields to answers, whichever API's route took it.

Checks what fields ask for together, has the prompt made, and hands over answers that are not begun. Routes that speak another API than
OpenAI's make a `ChatCompletionRequest` of theirs and write these answers in their own shape.
"""

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from engine.request import Prompt
from vlm_server.aborting import AbortSwitch, unless_aborted
from vlm_server.answer_grammar import answer_grammar, check_calls
from vlm_server.auth import tenant_of
from vlm_server.context import ServerContext, Stopwatch
from vlm_server.files import images_in
from vlm_server.generation import NO_PROMPT, Generation
from vlm_server.guided import grammar_of
from vlm_server.middleware import request_timings
from vlm_server.picture_report import PictureReport
from vlm_server.protocol import ChatCompletionRequest
from vlm_server.stage_timings import StageTimings
from vlm_server.streaming import unless_client_leaves
from vlm_server.tools import AnswerPlan, plan_answer

_NUM_END_TOKENS = 16  # enough for the marker that opens the reasoning, at the prompt's end


@dataclass(frozen=True, slots=True)
class Chat:
    """A request's answers, not yet begun. is_plain: they are content alone, without reasoning or calls."""

    generation: Generation
    warnings: list[str]
    is_plain: bool
    report: PictureReport  # what became of its pictures


async def begin_chat(
    request: Request, context: ServerContext, body: ChatCompletionRequest, *, response_id: str, abort: AbortSwitch | None = None
) -> Chat:
    """abort: ends the answers with the finish reason `abort`, for APIs that can say so.

    Raises what stands between a request and its answers: ApiError, MediaError or EngineError, each naming the field.
    """
    warnings = context.accept(request, body) + _without_effect(context, body)
    plan = plan_answer(body, context.formats)
    form = await unless_client_leaves(request, _form(context, body, plan))
    tokenizer = context.backend.pipeline.tokenizer
    watch = Stopwatch()
    timings = request_timings(request.scope)
    report = PictureReport.of(body.on_media_error, body.return_image_sizes)
    work = _prompt(context, body, plan, tenant_of(request.scope), timings, report)
    prompt = await unless_client_leaves(request, unless_aborted(abort, work, instead=NO_PROMPT))
    context.metrics.prompt_prepared(watch.elapsed_s)
    prompt_end = tokenizer.decode(prompt.token_ids[-_NUM_END_TOKENS:], skip_special_tokens=False)
    in_reasoning = plan.begins_in_reasoning(prompt_end, body.continued_text())
    generation = context.generation(
        body,
        [prompt],
        grammar=answer_grammar(plan, form, token_id_of=tokenizer.added_token_id, in_reasoning=in_reasoning),
        request_id=response_id,
        abort=abort,
        decoder=tokenizer.showing(plan.markers) if plan.markers else None,
        new_parser=lambda: plan.parser(in_reasoning=in_reasoning),
    )
    return Chat(generation, warnings + report.warnings(), plan.is_plain, report)


async def _form(context: ServerContext, body: ChatCompletionRequest, plan: AnswerPlan) -> str | None:
    """The grammar of an answer without calls; None: any text. Raises ApiError where it, or that of the calls, cannot be followed."""
    form = await grammar_of(body, context.backend.grammars)
    await check_calls(plan, context.backend.pipeline.tokenizer.added_token_id, context.backend.grammars)
    return form


async def count_tokens(request: Request, context: ServerContext, body: ChatCompletionRequest) -> tuple[int, list[str]]:
    """The tokens of the prompt that `begin_chat` makes of a list of messages, with warnings about pictures that are left out.

    Pictures are measured by their headers. Raises as that does.
    """
    context.accept(request, body)
    plan, report = plan_answer(body, context.formats), PictureReport.of(body.on_media_error)
    tokens = await unless_client_leaves(request, _tokens(context, body, plan, tenant_of(request.scope), report))
    return len(tokens), report.warnings()


async def _tokens(context: ServerContext, body: ChatCompletionRequest, plan: AnswerPlan, tenant: str, report: PictureReport) -> list[int]:
    chat = await _written(context, body, plan, tenant, StageTimings(), report)
    return await context.backend.pipeline.chat_tokens(**chat)


async def _prompt(
    context: ServerContext, body: ChatCompletionRequest, plan: AnswerPlan, tenant: str, timings: StageTimings, report: PictureReport
) -> Prompt:
    if isinstance(body.messages, str):
        with timings.stage("tokenize"):
            return await context.text_prompt(body.messages, tenant=tenant)
    chat = await _written(context, body, plan, tenant, timings, report)
    return await context.backend.pipeline.chat_prompt(**chat, timings=timings)


async def _written(
    context: ServerContext, body: ChatCompletionRequest, plan: AnswerPlan, tenant: str, timings: StageTimings, report: PictureReport
) -> dict[str, Any]:
    """What the pipeline writes into the prompt, uploaded pictures among it."""
    assert not isinstance(body.messages, str)
    messages = [message.as_dict() for message in body.messages]
    return {
        "messages": messages,
        "pictures": await _uploaded(context, messages, tenant, timings, report),
        "report": report,
        "tools": plan.template_tools(),
        "template_kwargs": body.template_kwargs() or None,
        "image_settings": body.image_settings(),
        "add_generation_prompt": body.adds_generation_prompt,
        "continue_final_message": bool(body.continue_final_message),
        "tenant": tenant,
    }


async def _uploaded(
    context: ServerContext, messages: list[dict[str, Any]], tenant: str, timings: StageTimings, report: PictureReport
) -> dict[str, bytes]:
    """The files that the messages name by their ids; in the messages their URLs stand afterwards."""
    images = list(images_in(messages))
    if not images:
        return {}
    with timings.stage("files"):
        return await context.files.take(images, tenant=tenant, lost=report.lost if report.may_fail else None)


def _without_effect(context: ServerContext, body: ChatCompletionRequest) -> list[str]:
    """Warnings for short names of template variables that the template does not have."""
    given = [name for name in ("enable_thinking", "reasoning_effort") if getattr(body, name) is not None]
    template = context.backend.pipeline.template.text
    return [f"{name}: the model's chat template has no such variable; it has no effect" for name in given if name not in template]
