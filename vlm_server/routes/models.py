"""`GET /v1/models` and `GET /v1/models/{id}`. Requests with the header of Anthropic's clients get its shape."""

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from vlm_server.anthropic.models import model_info, model_list
from vlm_server.context import ServerContext, context_of
from vlm_server.errors import ApiError, speaks_anthropic
from vlm_server.response_schema import ModelCard, ModelList

router = APIRouter(tags=["models"])


@router.get("/v1/models", response_model=ModelList, summary="What this server serves")
async def list_models(request: Request) -> Response:
    """One model, under the id that requests name. With the header `anthropic-version`, in Anthropic's shape."""
    context = context_of(request)
    return _json(model_list(context) if speaks_anthropic(request.scope) else {"object": "list", "data": [_card(context)]})


@router.get("/v1/models/{model_id:path}", response_model=ModelCard, summary="One model; its id may hold slashes")
async def retrieve_model(request: Request, model_id: str) -> Response:
    """The same object as in the list; 404 for every other id."""
    context = context_of(request)
    if speaks_anthropic(request.scope):
        return _json(model_info(context, model_id))
    if model_id != context.config.model_name:
        raise ApiError(404, "model_not_found", f"the model {model_id!r} does not exist", param="model")
    return _json(_card(context))


def _card(context: ServerContext) -> dict[str, object]:
    info = context.backend.engine.info
    return {
        "id": context.config.model_name,
        "object": "model",
        "created": context.created_s,
        "owned_by": "vlm-server",
        "root": context.config.model_root,
        "parent": None,
        "max_model_len": info.session_len if info else None,
        "permission": [_permission(context)],
    }


def _permission(context: ServerContext) -> dict[str, object]:
    """As LMDeploy's, which copied what OpenAI once sent; nothing in it is checked."""
    return {
        "id": f"modelperm-{context.created_s}",
        "object": "model_permission",
        "created": context.created_s,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": True,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }


def _json(content: dict[str, object]) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
