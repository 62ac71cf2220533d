"""API keys: every path needs one but health, the docs and their assets, and the files of the chat page.

Without configured keys all are welcome, whatever they send.

Each key is a tenant of its own: what one tenant's prompts and pictures left in the caches is never another's to find.
"""

import hashlib
import hmac
from collections.abc import Collection, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from vlm_server.errors import ApiError

OPEN_PATHS = frozenset({"/", "/health", "/openapi.json"})
OPEN_PREFIX = "/swagger-ui/"


class RequireApiKey:
    """Answers 401 unless the request brings `Authorization: Bearer KEY`, or `x-api-key: KEY`, with one of the keys.

    open_paths: more paths that need none, exactly as they are routed: decoded, and neither `..` nor another spelling is resolved.
    """

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str], open_paths: Collection[str] = ()) -> None:
        self._app = app
        self._open_paths = OPEN_PATHS.union(open_paths)
        self._digests = [_digest(key) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or self._is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        tenant = self._tenant(Headers(scope=scope))
        if tenant is not None:
            scope["tenant"] = tenant  # in place: the router leaves its route there for the log
            await self._app(scope, receive, send)
            return
        message = "this server needs one of its API keys in the header Authorization: Bearer KEY (or x-api-key: KEY)"
        error = ApiError(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})
        await error.response(scope)(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in self._open_paths or (path.startswith(OPEN_PREFIX) and ".." not in path)

    def _tenant(self, headers: Headers) -> str | None:
        """The key's digest, if it is one of ours."""
        digest = _digest(_key_in(headers))
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them: the time tells nothing
        return digest.hex() if any(matches) else None


def tenant_of(scope: Scope) -> str:
    """Whose request it is; all are one tenant where no keys are configured."""
    return str(scope.get("tenant", ""))


def _key_in(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
