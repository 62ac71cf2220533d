"""API keys: every path needs one but those that are named as open, by the very string that is routed.

A key comes in `Authorization: Bearer KEY` or in `x-api-key: KEY`, never in the path or the query. Without configured keys all are welcome,
whatever they send. Each key is a tenant of its own: what one tenant's prompts and pictures left in the caches is never another's to find.
"""

import asyncio
import hmac
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from vlm_server.api_keys import MIN_CHARACTERS, ApiKey, ApiKeysError, digest_of
from vlm_server.errors import ApiError
from vlm_server.middleware import request_facts
from vlm_server.quotas import Quota

logger = logging.getLogger(__name__)

_MAX_NAMED = 8  # keys in one warning
OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})


@dataclass(frozen=True, slots=True)
class KeyHolder:
    """A known key and what is left of its quota."""

    key: ApiKey
    quota: Quota

    @property
    def tenant(self) -> str:
        return self.key.digest.hex()


class KeyRing:
    """The keys that open the server now."""

    def __init__(self, load: Callable[[], Sequence[ApiKey]], *, new_quota: Callable[[ApiKey], Quota]) -> None:
        """load: reads them, here and in `reload`; what it raises is raised here."""
        self._load = load
        self._new_quota = new_quota
        self._reloading = asyncio.Lock()
        self._holders: tuple[KeyHolder, ...] = ()
        self._replace(load())

    def find(self, given: Sequence[str]) -> KeyHolder | None:
        """Whose key is among `given`. Compares all with all: the time tells nothing."""
        found = None
        for digest in map(digest_of, given):
            for holder in self._holders:
                is_same = hmac.compare_digest(digest, holder.key.digest)
                found = holder if is_same and found is None else found
        return found

    async def reload(self) -> None:
        """Reads the keys again, in a thread. Where one of them is wrong all stay as they were, and the log says why."""
        async with self._reloading:
            try:
                keys = await asyncio.to_thread(self._load)
            except ApiKeysError as error:
                logger.error("the API keys stay as they were: %s", error)
                return
            self._replace(keys)
            logger.warning("read the API keys again: there are %d", len(keys))

    def _replace(self, keys: Sequence[ApiKey]) -> None:
        """A key that keeps its name keeps what it has used."""
        _warn_of_guessable(keys)
        quotas = {holder.key.name: holder.quota for holder in self._holders}
        for key in keys:
            if key.name in quotas:
                quotas[key.name].change(key.limits)
        self._holders = tuple(KeyHolder(key, quotas.get(key.name) or self._new_quota(key)) for key in keys)


def _warn_of_guessable(keys: Sequence[ApiKey]) -> None:
    names = [key.name for key in keys if key.is_guessable]
    if names:
        shown = ", ".join(names[:_MAX_NAMED]) + (" …" if len(names) > _MAX_NAMED else "")
        logger.warning(
            "%d API keys can be guessed, for they have fewer than %d characters or come from the example file: %s; "
            "make new ones, e.g. with openssl rand -hex 32",
            len(names),
            MIN_CHARACTERS,
            shown,
        )


class RequireApiKey:
    """Answers 401 unless the request brings one of the keys.

    open_paths: paths that need none, exactly as they are routed: decoded, and neither `..` nor another spelling is resolved.
    """

    def __init__(self, app: ASGIApp, *, keys: KeyRing, open_paths: Collection[str] = ()) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = OPEN_PATHS.union(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and self._is_open(scope)):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket: no route has one
            await send({"type": "websocket.close", "code": 1008})
            return
        holder = self._keys.find(given_keys(Headers(scope=scope)))
        if holder is not None:
            scope["key_holder"] = holder  # in place: the router leaves its route there for the log
            request_facts(scope)["key"] = holder.key.name
            await self._app(scope, receive, send)
            return
        await _key_needed().response(scope)(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        return scope["method"] == "OPTIONS" or scope["path"] in self._open_paths


def check_key(request: Request) -> None:
    """For what an open path does only for those who bring a key, where keys are needed. Raises ApiError 401."""
    keys: KeyRing | None = request.app.state.keys
    if keys is not None and keys.find(given_keys(request.headers)) is None:
        raise _key_needed()


def _key_needed() -> ApiError:
    message = "this server needs one of its API keys in the header Authorization: Bearer KEY, or in x-api-key: KEY"
    return ApiError(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})


def given_keys(headers: Headers) -> list[str]:
    """What a client offers as its key, under either header's name."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    given = [bearer.strip()] if scheme.lower() == "bearer" else []
    return [*given, headers["x-api-key"].strip()] if "x-api-key" in headers else given


def holder_of(scope: Scope) -> KeyHolder | None:
    """Whose key the request brought; None where none is needed."""
    holder: KeyHolder | None = scope.get("key_holder")
    return holder


def tenant_of(scope: Scope) -> str:
    """Whose request it is; all are one tenant where no keys are configured."""
    holder = holder_of(scope)
    return holder.tenant if holder is not None else ""
