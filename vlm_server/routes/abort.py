"""`POST /abort_request`: end requests that run, as LMDeploy's operators call it."""

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from vlm_server.aborting import NO_SESSION
from vlm_server.auth import tenant_of
from vlm_server.context import context_of
from vlm_server.errors import ApiError, bad_request
from vlm_server.field_rules import check_fields
from vlm_server.generate_protocol import AbortRequest
from vlm_server.json_body import JsonRoute

router = APIRouter(route_class=JsonRoute, tags=["operation"])


@router.post("/abort_request", summary="End running answers, with --enable-abort-handling", response_class=Response)
async def abort_request(request: Request, body: AbortRequest) -> Response:
    """Of this API key alone. They answer at once with what they have and `finish_reason: "abort"`, and give their memory back.

    Where an API has other words, a response is `cancelled` and a message ends with `max_tokens`.
    """
    context = context_of(request)
    if context.running is None:
        raise ApiError(501, "not_enabled", "this server was started without --enable-abort-handling")
    warnings = check_fields(body, strict=context.config.strict_fields)
    tenant = tenant_of(request.scope)
    if body.abort_all:
        context.running.abort_all(tenant)
    elif body.session_id == NO_SESSION:
        raise bad_request("missing_required_parameter", "session_id: it is needed unless abort_all is true", param="session_id")
    elif not context.running.abort(tenant, body.session_id):
        raise bad_request("unknown_session", f"session_id: no request runs under {body.session_id}", param="session_id")
    return Response(msgspec.json.encode({"warnings": warnings}), media_type="application/json") if warnings else Response()
