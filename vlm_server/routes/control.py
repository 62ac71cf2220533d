"""`GET /is_sleeping` and `GET /terminate`, as LMDeploy's operators call them."""

import os
import signal

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from vlm_server.context import context_of
from vlm_server.errors import ApiError
from vlm_server.response_schema import IsSleepingResponse

router = APIRouter(tags=["operation"])


@router.get("/is_sleeping", response_model=IsSleepingResponse, summary="Always false: this server does not sleep")
async def is_sleeping(request: Request) -> Response:
    """For LMDeploy's operators, who ask before they send requests."""
    return Response(msgspec.json.encode({"is_sleeping": False}), media_type="application/json")


@router.get("/terminate", summary="End the server, with --allow-terminate-by-client", response_class=Response)
async def terminate(request: Request) -> Response:
    """Running answers get a few seconds to end."""
    if not context_of(request).config.allow_terminate_by_client:
        raise ApiError(400, "not_allowed", "this server was started without --allow-terminate-by-client")
    os.kill(os.getpid(), signal.SIGTERM)  # as a terminal's Ctrl-C: uvicorn stops taking requests and ends
    return Response()
