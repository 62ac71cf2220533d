"""Bodies of JSON, read under limits: how deeply they may be nested, and of how many values they may be.

A few megabytes of `{},{},…` fill gigabytes of memory once they are read, and a thousand brackets end every recursion over them. So values
are counted in the bytes, before anything is made of them; lists and objects once more, before they are checked against a route's fields,
which takes the time of hundreds of plain values for each. Knows nothing of what the values mean.
"""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from vlm_server.config import RequestLimits
from vlm_server.errors import ApiError, RefusedBodyError, bad_request
from vlm_server.nesting import is_too_deep, levels

_MARKS = (b",", b"[", b"{")  # each value but the first comes behind one
_NUM_HOPS = 10_000  # from one mark to the next; bodies with more are full of them, where counting byte by byte is quicker
_MAX_NAME_CHARACTERS = 64

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRoute(APIRoute):
    """A route whose body is read by `read_json`. What is refused is raised as FastAPI lets it through."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def limited(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return limited


class _JsonRequest(Request):
    async def body(self) -> bytes:
        """FastAPI, which asks for it first, would call a client that left in it one that sent a wrong body."""
        try:
            return await super().body()
        except ClientDisconnect:
            raise RefusedBodyError(ApiError(499, "client_closed_request", "the client closed its connection")) from None

    async def json(self) -> Any:
        limits: RequestLimits = self.app.state.context.config.limits
        try:
            return read_json(await self.body(), limits)
        except ApiError as error:
            raise RefusedBodyError(error) from error


def read_json(body: bytes, limits: RequestLimits) -> Any:
    """The value that `body` writes. Raises ApiError 400, or json.JSONDecodeError where it is no JSON."""
    if len(body) > limits.max_json_values and _num_marks(body) >= limits.max_json_values:
        message = f"the body has more than the allowed {limits.max_json_values} values (--max-json-values)"
        raise bad_request("json_too_large", message)
    try:
        value = json.loads(body)
    except RecursionError:
        raise _too_deep(None, limits) from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # other text than UTF-8, or a number of thousands of digits
        raise bad_request("invalid_json", "the body is not JSON in UTF-8, or holds a number that is too long") from None
    num_containers = 0
    for depth, level in enumerate(levels(value), 1):
        if depth > limits.max_json_depth:
            raise _too_deep(_deep_field(value, limits.max_json_depth), limits)
        num_containers += len(level)
        if num_containers > limits.max_json_containers:
            message = f"the body has more than the allowed {limits.max_json_containers} lists and objects (--max-json-containers)"
            raise bad_request("json_too_large", message)
    return value


def _num_marks(body: bytes) -> int:
    """At least as many as the values but one: those within strings are counted too."""
    return sum(_num_of(mark, body) for mark in _MARKS)


def _num_of(mark: bytes, body: bytes) -> int:
    """Quicker than `bytes.count` where there are few, as in a picture's base64."""
    place = -1
    for count in range(_NUM_HOPS):
        place = body.find(mark, place + 1)
        if place < 0:
            return count
    return _NUM_HOPS + body.count(mark, place + 1)


def _deep_field(value: Any, limit: int) -> str | None:
    """The field of the body within which it is too deep."""
    fields = value.items() if isinstance(value, dict) else ()
    name = next((name for name, inner in fields if is_too_deep(inner, limit - 1)), "")
    return name if name.isidentifier() and len(name) <= _MAX_NAME_CHARACTERS else None


def _too_deep(field: str | None, limits: RequestLimits) -> ApiError:
    message = f"{field or 'the body'}: more than {limits.max_json_depth} levels of lists and objects (--max-json-depth)"
    return bad_request("json_too_deep", message, param=field)
