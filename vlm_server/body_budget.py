"""Opens a request's holding of media, counts its body in it as the bytes arrive, and gives everything back when its answer is taken.

Who waits for room is not read from meanwhile; who finds none is refused. A large answer counts too, and leaves in pieces, so that the
request lasts until its client has it. Knows nothing of what bodies and answers hold.
"""

import ipaddress

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vision.budget import BudgetFullError, Reservation
from vision.media_budgets import FREE_BYTES, Holding, MediaBudgets, held_by
from vlm_server.auth import holder_of
from vlm_server.errors import to_api_error

PIECE_BYTES = 64 << 10  # of an answer: about as much as the connection buffers anyway


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
            await self._app(scope, _Body(receive, holding).receive, _Answer(scope, receive, send, holding).send)


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


class _Answer:
    """One answer as it is taken. The head of a large whole one waits for its body, so that it becomes a refusal where there is no room.

    A server waits, before it takes a message, until the client has taken those before; what it takes at once is nobody's to count.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, holding: Holding) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._holding = holding
        self._head: Message | None = None
        self._is_refused = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _stated_length(message) > FREE_BYTES:
            self._head = message
            return
        if self._head is not None:
            await self._send_head(self._head, message)
        if not self._is_refused:
            await self._send_piecewise(message)

    async def _send_head(self, head: Message, body: Message) -> None:
        self._head = None
        try:
            if not body.get("more_body"):
                await self._count(len(body.get("body", b"")))
        except BudgetFullError as error:
            self._is_refused = True
            await to_api_error(error).response(self._scope)(self._scope, self._receive, self._send)
        else:
            await self._send(head)

    async def _count(self, num_bytes: int) -> None:
        """Beyond what the request holds already: what the answer was made of is mostly gone by now."""
        if (more := num_bytes - self._holding.num_bytes) > 0:
            await self._holding.add_bytes(more)

    async def _send_piecewise(self, message: Message) -> None:
        body = message.get("body", b"")
        if len(body) <= PIECE_BYTES:
            await self._send(message)
            return
        last = (len(body) - 1) // PIECE_BYTES * PIECE_BYTES
        for begin in range(0, last, PIECE_BYTES):
            await self._send({"type": message["type"], "body": body[begin : begin + PIECE_BYTES], "more_body": True})
        await self._send({**message, "body": body[last:]})


def _stated_length(head: Message) -> int:
    """0 for a stream, whose pieces are small."""
    return next((int(value) for name, value in head.get("headers", ()) if name == b"content-length"), 0)


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
