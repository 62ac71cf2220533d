"""`GET /status`: what the page at `/ui/status` draws, in one answer."""

from typing import Annotated

import msgspec
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from vlm_server import __version__
from vlm_server.context import ServerContext, context_of
from vlm_server.readiness import Readiness
from vlm_server.response_schema import StatusResponse
from vlm_server.status_board import StatusBoard
from vlm_server.streaming import unless_client_leaves

router = APIRouter(tags=["operation"])


@router.get("/status", response_model=StatusResponse, summary="The numbers of this moment, as the page at /ui/status draws them")
async def status(
    request: Request,
    history: Annotated[bool, Query(description="Also the samples of the last five minutes, one every three seconds.")] = False,
) -> Response:
    """Gauges and counters of the engine and of the pictures' stages, limits, and whether the server is ready. Counters go on from the
    start of the server, or of its engine; take two samples for a rate. Switched off with /metrics. Not counted by the key's quota.
    """
    board: StatusBoard = request.app.state.status_board
    sample = await unless_client_leaves(request, board.sample())
    content = _content(context_of(request), request.app.state.readiness, board)
    content |= {"sample": sample, "history": board.history if history else []}
    return Response(msgspec.json.encode(content), headers={"cache-control": "no-store"}, media_type="application/json")


def _content(context: ServerContext, readiness: Readiness, board: StatusBoard) -> dict[str, object]:
    engine, config = context.backend.engine, context.config
    return {
        "model": config.model_name,
        "version": __version__,
        "started_at": context.created_s,
        "uptime_s": board.uptime_s,
        "readiness": readiness.standing().body(),
        "engine": {
            "state": str(engine.state),
            "failure": engine.failure,
            "num_restarts": engine.num_restarts,
            "silence_s": board.silence_s,
            "info": engine.info,
        },
        "num_turns": context.turns.num_running,
        "limits": {
            "max_batch_size": config.engine.max_batch_size,
            "max_waiting": config.engine.max_waiting,
            "embedding_cache_bytes": config.engine.embedding_cache_bytes,
            "processed_cache_bytes": config.vision.processed_cache_bytes,
        },
    }
