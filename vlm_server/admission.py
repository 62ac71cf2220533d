"""Lets a request in while its key's quota lasts, opens the meter that charges its work, and tells the client how the quota stands.

A request that the server could not take (429, 5xx) is not counted. What tokens and pictures cost is charged where they are computed.
"""

import math
from collections.abc import Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm_server.auth import holder_of
from vlm_server.errors import to_api_error
from vlm_server.metering import metered
from vlm_server.quotas import PIXELS, REQUESTS, TOKENS, Quota, QuotaExceededError, Standing, shown

# OpenAI's names for the first two kinds; what a page of another origin may read.
QUOTA_HEADERS = tuple(f"x-ratelimit-{what}-{kind}" for kind in (REQUESTS, TOKENS, PIXELS) for what in ("limit", "remaining", "reset"))

_NS_PER_MS = 1_000_000
_UNCOUNTED_PATHS = frozenset({"/status"})  # a page asks for it every second; it is no work for the model


class EnforceQuotas:
    """Inside of `RequireApiKey`, outside of all that reads the request's body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        holder = holder_of(scope)
        if holder is None or not holder.quota.is_limited or scope["path"] in _UNCOUNTED_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            holder.quota.admit(REQUESTS)
        except QuotaExceededError as error:
            await to_api_error(error).response(scope)(scope, receive, _telling(send, holder.quota))
            return
        await self._admitted(scope, receive, send, holder.quota)

    async def _admitted(self, scope: Scope, receive: Receive, send: Send, quota: Quota) -> None:
        quota.take(REQUESTS, 1)
        has_answer = False

        async def noting(message: Message) -> None:
            nonlocal has_answer
            if message["type"] == "http.response.start":
                has_answer = True
                if is_ours(message["status"]):
                    quota.give_back(REQUESTS, 1)
            await telling(message)

        telling = _telling(send, quota)
        try:
            with metered(quota):
                await self._app(scope, receive, noting)
        except Exception:
            if not has_answer:
                quota.give_back(REQUESTS, 1)
            raise


def is_ours(status: int) -> bool:
    """Whether it was the server that could not answer, not the request that was wrong."""
    return status == 429 or status >= 500


def _telling(send: Send, quota: Quota) -> Send:
    async def send_with_standing(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(_headers(quota.standings()))
        await send(message)

    return send_with_standing


def _headers(standings: Mapping[str, Standing]) -> dict[str, str]:
    headers = {}
    for kind, standing in standings.items():
        headers[f"x-ratelimit-limit-{kind}"] = shown(kind, standing.limit)
        headers[f"x-ratelimit-remaining-{kind}"] = shown(kind, standing.remaining)
        headers[f"x-ratelimit-reset-{kind}"] = duration(standing.reset_ns)
    return headers


def duration(span_ns: int) -> str:
    """Rounded up, as OpenAI writes it: 20ms, 12s, 6m0s."""
    span_ms = math.ceil(span_ns / _NS_PER_MS)
    if span_ms < 1000:
        return f"{span_ms}ms"
    minutes, seconds = divmod(math.ceil(span_ms / 1000), 60)
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
