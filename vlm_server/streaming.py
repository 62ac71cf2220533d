"""Answers as HTTP: one JSON response, or server-sent events while they are written.

Headers are sent with the first piece of an answer, so that what the engine refuses still gets its own status. A client that leaves
closes the generation, whether it waits for a response, a stream or its first piece. Plain dicts, no models: this path runs per token.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec
from sse_starlette import EventSourceResponse
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vlm_server.errors import ApiError, to_api_error
from vlm_server.generation import Delta, FinishedAnswer, Generation, Usage
from vlm_server.middleware import request_facts, request_timings

logger = logging.getLogger(__name__)

_encode = msgspec.json.Encoder().encode

UNFINISHED = "unfinished"  # in the log: answers that failed, or that nobody waited for

_UNTIL_THE_SERVER_ENDS_IT = 86400.0  # seconds: sse-starlette's own end at a signal; how long requests may finish is the server's to say

MAX_SCORED_ON_LOOP = 256  # tokens with log probabilities, 50 µs each with 20 others beside it; more are written in a thread

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class EventStyle:
    """How one API writes its chunks as server-sent events.

    is_named: each event has a line `event: ` with the chunk's own `type`. closing: what comes after the last one.
    """

    is_named: bool = False
    closing: bytes = b"data: [DONE]\n\n"

    def event(self, chunk: dict[str, Any]) -> bytes:
        name = b"event: " + chunk["type"].encode() + b"\n" if self.is_named else b""
        return name + b"data: " + _encode(chunk) + b"\n\n"


OPENAI_EVENTS = EventStyle()


class Shape(Protocol):
    """How one route writes its answers."""

    @property
    def events(self) -> EventStyle: ...

    def first_chunks(self, num_answers: int, usage: Usage) -> list[dict[str, Any]]:
        """Chunks before any text."""

    def chunks(self, delta: Delta) -> list[dict[str, Any]]: ...

    def last_chunks(self, usage: Usage) -> list[dict[str, Any]]:
        """Chunks after all answers have ended."""

    def error_chunk(self, error: ApiError, usage: Usage) -> dict[str, Any]:
        """The last chunk of a stream that failed."""

    def response(self, answers: list[FinishedAnswer], usage: Usage) -> dict[str, Any]: ...


BeforeEnd = Callable[[], Awaitable[None]]


async def answer(
    request: Request, generation: Generation, shape: Shape, *, streams: bool, ping_s: float, before_end: BeforeEnd | None = None
) -> Response:
    """The generation's answers, streamed or whole.

    before_end: awaited once the shape has all of the answers and the client is not told yet, of a stream before `last_chunks` are made;
    what it raises fails the request.
    """
    if streams:
        return await stream(request, generation, shape, ping_s=ping_s, before_end=before_end)
    return await respond(request, generation, shape, before_end=before_end)


async def respond(request: Request, generation: Generation, shape: Shape, *, before_end: BeforeEnd | None = None) -> Response:
    """The whole answer as one JSON response. Raises what the engine raises, and ApiError 499 where the client left."""
    try:
        answers = await unless_client_leaves(request, generation.collect())
    finally:
        _note_usage(request, generation)
    generation.tell(request_timings(request.scope))
    usage, num_scored = generation.usage(), sum(map(_num_scored, answers))
    response = await _unless_long(num_scored, lambda: shape.response(answers, usage))
    if before_end is not None:
        await before_end()
    return Response(_encode(response), media_type="application/json")


async def stream(request: Request, generation: Generation, shape: Shape, *, ping_s: float, before_end: BeforeEnd | None = None) -> Response:
    """The answer as events, begun. Raises what the engine raises before the first piece."""
    deltas = generation.deltas()
    try:
        first = await unless_client_leaves(request, anext(deltas))
    except BaseException:
        await deltas.aclose()
        _note_usage(request, generation)
        raise
    generation.tell(request_timings(request.scope))
    events = _events(request, generation, shape, first, deltas, before_end)
    return EventStream(events, deltas, ping_s=ping_s)


class EventStream(EventSourceResponse):
    """sse-starlette's response with `\\n` line ends; closes the events and what they come from even if the stream never began."""

    def __init__(self, events: AsyncGenerator[bytes, None], source: AsyncGenerator[Any, None], *, ping_s: float) -> None:
        super().__init__(events, sep="\n", ping=ping_s, shutdown_grace_period=_UNTIL_THE_SERVER_ENDS_IT)
        self._events = events
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._source.aclose()


async def _events(
    request: Request,
    generation: Generation,
    shape: Shape,
    first: Delta,
    deltas: AsyncGenerator[Delta, None],
    before_end: BeforeEnd | None,
) -> AsyncGenerator[bytes, None]:
    event, closing = shape.events.event, shape.events.closing
    try:
        async with aclosing(deltas):
            beginning = shape.first_chunks(generation.num_answers, generation.usage())
            yield b"".join([*map(event, beginning), await _written(shape, first)])
            async for delta in deltas:
                if delta.finish_reason is not None:
                    generation.tell(request_timings(request.scope))
                if written := await _written(shape, delta):
                    yield written
        if before_end is not None:
            await before_end()
        yield b"".join(event(chunk) for chunk in shape.last_chunks(generation.usage())) + closing
    except Exception as error:  # the status is sent already: the error becomes the last event
        api_error = to_api_error(error)
        if api_error.code == "internal_error":
            logger.exception("a stream failed")
        request_facts(request.scope)["error"] = api_error.code
        yield event(shape.error_chunk(api_error, generation.usage())) + closing
    finally:
        _note_usage(request, generation)


async def _written(shape: Shape, delta: Delta) -> bytes:
    event = shape.events.event
    return await _unless_long(_num_scored(delta), lambda: b"".join(map(event, shape.chunks(delta))))


def _num_scored(piece: Delta | FinishedAnswer) -> int:
    """Tokens with log probabilities."""
    return len(piece.logprobs or ()) + len(piece.prompt_logprobs or ())


async def _unless_long(num_scored: int, write: Callable[[], Result]) -> Result:
    """What `write` gives, from a thread where it would hold up the event loop."""
    return write() if num_scored <= MAX_SCORED_ON_LOOP else await asyncio.to_thread(write)


def _note_usage(request: Request, generation: Generation) -> None:
    note_usage(request, generation.usage())
    request_facts(request.scope)["finish_reason"] = ",".join(generation.finish_reasons) or UNFINISHED


def note_usage(request: Request, usage: Usage) -> None:
    """For the request's line in the log."""
    request_facts(request.scope).update(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        image_tokens=usage.image_tokens,
        completion_tokens=usage.completion_tokens,
    )


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled as soon as the client closes its connection; then ApiError 499.

    To be called once the request's body is read: nothing but the disconnect is left to be received.
    """
    task = asyncio.create_task(work)
    disconnect = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "client_closed_request", "the client closed its connection")
    finally:
        task.cancel()
        disconnect.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
