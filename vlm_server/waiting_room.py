"""Requests whose answer has not begun, counted from their head on: a full room refuses the next one before its body is read.

So a refusal costs next to nothing, however many come, and no picture is fetched for an answer that there is no room for. Each key has one
place even in a full room, or one tenant could lock out the others. Knows nothing of what requests ask for.
"""

import math
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, cast

from starlette.types import ASGIApp, Receive, Scope, Send

from engine.request import Prompt, QueueFullError, SamplingParams, StepOutput
from vlm_server.auth import tenant_of
from vlm_server.backend import Engine
from vlm_server.errors import to_api_error
from vlm_server.middleware import request_facts

RESERVED_S = 5.0  # for which a request that is prepared keeps its place: a slow picture server must not fill the room
MAX_RETRY_AFTER_S = 60

# Routes that generate. A turn of a session enters by itself: cancelling comes by the same route, and is most wanted where the room is full.
WAITING_PATHS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/messages",
        "/anthropic/v1/messages",
        "/v1/responses",
        "/generate",
        "/get_ppl",
    }
)
_NUM_BEGINNINGS = 64  # of which the rate is measured


class WaitingRoom:
    """At most `limit` requests, those that are prepared and those that the engine has, and one of each tenant who would have none.

    One event loop owns it.
    """

    def __init__(self, limit: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._num_submitted = 0  # the engine has them, and they have no output
        self._num_of: Counter[str] = Counter()  # all that wait, by tenant
        self._preparing: dict[Place, float] = {}  # with the time until which their place is kept, in order
        self._begun_s: deque[float] = deque(maxlen=_NUM_BEGINNINGS)

    @property
    def num_waiting(self) -> int:
        self._forget_late()
        return len(self._preparing) + self._num_submitted

    def enter(self, place: "Place") -> None:
        """Raises QueueFullError."""
        if self.num_waiting >= self.limit and not self._lets_in_first_of(place.tenant):
            message = f"{self.num_waiting} requests wait already, at most {self.limit} may (--max-waiting); try again later"
            raise QueueFullError(message, retry_after_s=self.retry_after_s())
        self._preparing[place] = self._clock() + RESERVED_S
        self._count(place.tenant, 1)

    def leave(self, place: "Place") -> None:
        """It is submitted, or has ended; where it was forgotten, nothing happens."""
        if self._preparing.pop(place, None) is not None:
            self._count(place.tenant, -1)

    def submit(self, tenant: str) -> None:
        """The engine is given a request; `begin` or `give_up` follows."""
        self._num_submitted += 1
        self._count(tenant, 1)

    def begin(self, tenant: str) -> None:
        """The answer to a submitted request begins."""
        self.give_up(tenant)
        self._begun_s.append(self._clock())

    def give_up(self, tenant: str) -> None:
        """A submitted request ends without an answer."""
        self._num_submitted -= 1
        self._count(tenant, -1)

    def retry_after_s(self) -> int:
        """Until about a quarter of the room is free, at the rate of the last beginnings."""
        if len(self._begun_s) < 2:
            return 1
        elapsed_s = max(self._clock() - self._begun_s[0], 1e-3)
        return min(max(math.ceil(self.limit / 4 * elapsed_s / len(self._begun_s)), 1), MAX_RETRY_AFTER_S)

    def _forget_late(self) -> None:
        now_s = self._clock()
        while self._preparing and next(iter(self._preparing.values())) <= now_s:
            self.leave(next(iter(self._preparing)))

    def _lets_in_first_of(self, tenant: str) -> bool:
        """As the engine's queue does. Without keys there are no tenants to keep apart."""
        return bool(tenant) and tenant not in self._num_of

    def _count(self, tenant: str, change: int) -> None:
        self._num_of[tenant] += change
        if not self._num_of[tenant]:
            del self._num_of[tenant]


class Place:
    """One request's in the room."""

    def __init__(self, room: WaitingRoom, tenant: str = "") -> None:
        self._room = room
        self.tenant = tenant

    def enter(self) -> None:
        """Raises QueueFullError."""
        self._room.enter(self)

    def leave(self) -> None:
        self._room.leave(self)


_PLACE: ContextVar[Place | None] = ContextVar("place", default=None)  # of the request that this work is for, in tasks that it starts too


class RefuseWhenFull:
    """Inside of keys and quotas, outside of all that reads a body."""

    def __init__(self, app: ASGIApp, *, room: WaitingRoom) -> None:
        self._app = app
        self._room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        scope["waiting_place"] = place = Place(self._room, tenant_of(scope))
        try:
            if scope["path"] in WAITING_PATHS:
                place.enter()
        except QueueFullError as error:
            request_facts(scope)["error"] = "queue_full"
            await to_api_error(error).response(scope)(scope, receive, send)
            return
        token = _PLACE.set(place)
        try:
            await self._app(scope, receive, send)
        finally:
            _PLACE.reset(token)
            place.leave()


def enter_waiting_room(scope: Scope) -> None:
    """For routes that know only from their body whether they generate. Raises QueueFullError."""
    place: Place = scope["waiting_place"]
    place.enter()


def awaited_engine(engine: Engine, room: WaitingRoom) -> Engine:
    """The engine as routes see it: what it has not begun counts in the room."""
    return cast(Engine, _AwaitedEngine(engine, room))


class _AwaitedEngine:
    """Has all that the engine has."""

    def __init__(self, engine: Engine, room: WaitingRoom) -> None:
        self._engine = engine
        self._room = room

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, prompt: Prompt, params: SamplingParams, *, request_id: str) -> AsyncGenerator[StepOutput, None]:
        room, place, has_begun = self._room, _PLACE.get(), False
        tenant = place.tenant if place is not None else prompt.tenant
        if place is not None:
            place.leave()
        room.submit(tenant)
        try:
            async with aclosing(self._engine.generate(prompt, params, request_id=request_id)) as steps:
                async for step in steps:
                    if not has_begun:
                        has_begun = True
                        room.begin(tenant)
                    yield step
        finally:
            if not has_begun:
                room.give_up(tenant)
