"""The served model as Anthropic's API lists models."""

from datetime import UTC, datetime

from vlm_server.context import ServerContext
from vlm_server.errors import ApiError


def model_list(context: ServerContext) -> dict[str, object]:
    """One page."""
    name = context.config.model_name
    return {"data": [model_info(context, name)], "has_more": False, "first_id": name, "last_id": name}


def model_info(context: ServerContext, model_id: str) -> dict[str, object]:
    """Raises ApiError 404 for other models."""
    if model_id != context.config.model_name:
        raise ApiError(404, "model_not_found", f"the model {model_id!r} does not exist", param="model")
    info = context.backend.engine.info
    return {
        "id": model_id,
        "type": "model",
        "display_name": model_id,
        "created_at": datetime.fromtimestamp(context.created_s, UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": info.session_len if info else None,
        "max_tokens": info.session_len if info else None,
    }
