"""Opens a request's holding of media, counts its body in it as the bytes arrive, and gives everything back when the request ends.

Who waits for room is not read from meanwhile; who finds none is refused. Knows nothing of what a body holds.
"""

import ipaddress

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vision.budget import BudgetFullError, Reservation
from vision.media_budgets import Holding, MediaBudgets, held_by
from vlm_server.auth import holder_of

FREE_BYTES = 64 << 10  # of each body: as much as the connection buffers anyway; chats without pictures pass whatever pictures do


class HoldsMedia:
    """Outside of all that reads the request's body; inside of `RequireApiKey`, so that nothing of strangers is held."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        budgets: MediaBudgets = scope["app"].state.context.backend.media
        holding = Holding(budgets, owner_of(scope))
        with held_by(holding):
            await self._app(scope, _Body(receive, holding).receive, send)


class _Body:
    """One body as it arrives. Its declared length is not asked for."""

    def __init__(self, receive: Receive, holding: Holding) -> None:
        self._receive = receive
        self._holding = holding
        self._num_bytes = 0
        self._held: Reservation | None = None

    async def receive(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if message["type"] == "http.request" and self._num_bytes > FREE_BYTES:
            await self._count()
        return message

    async def _count(self) -> None:
        try:
            if self._held is None:
                self._held = await self._holding.add_bytes(0)
            await self._held.resize(self._num_bytes)
        except BudgetFullError as error:  # HTTPException is the one kind that FastAPI lets through while it reads a body
            raise HTTPException(503, str(error), {"retry-after": str(error.retry_after_s)}) from None


def owner_of(scope: Scope) -> str:
    """Whose share of the budgets a request takes: its key's, or its address's where there are no keys."""
    holder = holder_of(scope)
    if holder is not None:
        return f"key {holder.tenant}"
    host, _ = scope.get("client") or ("unknown", 0)
    return f"address {network_of(host)}"


def network_of(host: str) -> str:
    """Of an IPv6 address its first 64 bits: whoever has one has all that begin with them."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:  # the path of a Unix socket
        return host
    return str(address) if address.version == 4 else str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
