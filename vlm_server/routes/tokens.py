"""`POST /tokenize`, `/detokenize` and LMDeploy's `/v1/encode`: text and chats to token ids and back, without generating."""

from collections.abc import Collection
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from vlm_server.auth import tenant_of
from vlm_server.context import ServerContext, context_of
from vlm_server.errors import bad_request
from vlm_server.files import images_in
from vlm_server.json_body import JsonRoute
from vlm_server.picture_report import PictureReport
from vlm_server.response_schema import DetokenizeResponse, EncodeResponse, TokenizeResponse
from vlm_server.streaming import unless_client_leaves
from vlm_server.token_protocol import DetokenizeRequest, EncodeRequest, TokenizeRequest, TokenRequest
from vlm_server.tools import check_tools

router = APIRouter(route_class=JsonRoute, tags=["tokens"])

_OF_PROMPTS = frozenset({"add_special_tokens"})
_OF_CHATS = frozenset(
    {
        *("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools"),
        *("mm_processor_kwargs", "on_media_error"),
    }
)


@router.post("/tokenize", response_model=TokenizeResponse, summary="The tokens of a prompt or a conversation")
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """As many as the same prompt or messages would be charged for. Pictures are measured by their headers."""
    context = context_of(request)
    is_chat = body.messages is not None
    warnings = context.accept(request, body) + _without_effect(body, _OF_PROMPTS if is_chat else _OF_CHATS)
    report = PictureReport.of(body.on_media_error)
    tokens = await unless_client_leaves(request, _tokens(context, body, tenant_of(request.scope), report))
    content: dict[str, Any] = {"count": len(tokens), "max_model_len": context.engine_info.session_len, "tokens": tokens}
    if body.return_token_strs:
        content["token_strs"] = await unless_client_leaves(request, _token_strs(context, tokens))
    return _json(content, warnings + report.warnings())


@router.post("/detokenize", response_model=DetokenizeResponse, summary="The text of token ids")
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """Bytes that are no UTF-8 become replacement characters."""
    context = context_of(request)
    warnings = context.accept(request, body)
    vocab_size = context.engine_info.vocab_size
    if max(body.tokens) >= vocab_size:
        index = next(index for index, token_id in enumerate(body.tokens) if token_id >= vocab_size)
        raise bad_request("invalid_value", f"tokens[{index}]: only 0 … {vocab_size - 1} are allowed", param=f"tokens[{index}]")
    pipeline = context.backend.pipeline
    decode = partial(pipeline.tokenizer.decode, body.tokens, skip_special_tokens=body.skip_special_tokens)
    text = await unless_client_leaves(request, pipeline.in_thread(decode))
    return _json({"prompt": text}, warnings)


@router.post("/v1/encode", response_model=EncodeResponse, summary="Token ids, as LMDeploy's clients ask for them")
async def encode(request: Request, body: EncodeRequest) -> Response:
    """One text gives a list of ids and its length, several give a list of each."""
    context = context_of(request)
    warnings = context.accept(request, body) + _without_effect(body, {"add_bos"} if body.do_preprocess else ())
    texts = [body.input] if isinstance(body.input, str) else body.input
    encoded = await unless_client_leaves(request, _encoded(context, texts, body, tenant_of(request.scope)))
    lengths = [len(tokens) for tokens in encoded]
    if isinstance(body.input, str):
        return _json({"input_ids": encoded[0], "length": lengths[0]}, warnings)
    return _json({"input_ids": encoded, "length": lengths}, warnings)


async def _tokens(context: ServerContext, body: TokenizeRequest, tenant: str, report: PictureReport) -> list[int]:
    pipeline = context.backend.pipeline
    if body.messages is None:
        assert body.prompt is not None
        return await pipeline.in_thread(partial(pipeline.text_tokens, body.prompt, add_special_tokens=body.add_special_tokens))
    if body.tools:
        check_tools(context.formats)
    messages = [message.as_dict() for message in body.messages]
    pictures = await context.files.take(images_in(messages), tenant=tenant, lost=report.lost if report.may_fail else None)
    return await pipeline.chat_tokens(
        messages,
        tools=[tool.as_dict() for tool in body.tools or ()] or None,
        template_kwargs=body.chat_template_kwargs,
        image_settings=body.mm_processor_kwargs.as_dict() if body.mm_processor_kwargs else None,
        tenant=tenant,
        add_generation_prompt=body.adds_generation_prompt,
        continue_final_message=body.continue_final_message,
        pictures=pictures,
        report=report,
    )


async def _encoded(context: ServerContext, texts: list[str], body: EncodeRequest, tenant: str) -> list[list[int]]:
    pipeline = context.backend.pipeline
    if body.do_preprocess:
        return [await pipeline.chat_tokens([{"role": "user", "content": text}], tenant=tenant) for text in texts]
    return [await pipeline.in_thread(partial(pipeline.text_tokens, text, add_special_tokens=body.add_bos)) for text in texts]


async def _token_strs(context: ServerContext, token_ids: list[int]) -> list[str]:
    pipeline = context.backend.pipeline
    token_bytes = pipeline.tokenizer.token_bytes
    return await pipeline.in_thread(lambda: [token_bytes(token_id).decode("utf-8", "replace") for token_id in token_ids])


def _without_effect(body: TokenRequest, names: Collection[str]) -> list[str]:
    """Warnings for fields of the other kind of request."""
    return [f"{name}: it has no effect here" for name in sorted(body.model_fields_set.intersection(names))]


def _json(content: dict[str, Any], warnings: list[str]) -> Response:
    return Response(msgspec.json.encode(content | ({"warnings": warnings} if warnings else {})), media_type="application/json")
