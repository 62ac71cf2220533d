"""API keys: every path needs one but health, the docs and their assets. Without configured keys all are welcome, whatever they send."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from vlm_server.errors import ApiError

OPEN_PATHS = frozenset({"/", "/health", "/openapi.json"})
OPEN_PREFIX = "/swagger-ui/"


class RequireApiKey:
    """Answers 401 unless the request brings `Authorization: Bearer KEY` with one of the keys."""

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or _is_open(scope) or self._is_allowed(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        message = "this server needs one of its API keys in the header Authorization: Bearer KEY"
        error = ApiError(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})
        await error.response()(scope, receive, send)

    def _is_allowed(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them: the time tells nothing
        return scheme.lower() == "bearer" and any(matches)


def _is_open(scope: Scope) -> bool:
    path = scope["path"]
    return path in OPEN_PATHS or (path.startswith(OPEN_PREFIX) and ".." not in path)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
