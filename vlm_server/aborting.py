"""Requests that another request may end: whose they are, under which number, and the switch that ends each.

Knows nothing of answers: what a switch does is said by the generation that it belongs to. Used with --enable-abort-handling alone.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import ASGIApp, Receive, Scope, Send

Result = TypeVar("Result")

NO_SESSION = -1  # a `session_id` that names nothing, as LMDeploy's clients send it


class AbortSwitch:
    """One request's. Once set it stays so."""

    def __init__(self) -> None:
        self.is_set = False
        self._on_set: Callable[[], object] | None = None

    def set(self) -> None:
        if not self.is_set:
            self.is_set = True
            if self._on_set is not None:
                self._on_set()

    def when_set(self, call: Callable[[], object]) -> None:
        """`call` is called once: when the switch is set, or now if it is."""
        self._on_set = call
        if self.is_set:
            call()


async def unless_aborted(switch: AbortSwitch | None, work: Coroutine[Any, Any, Result], *, instead: Result) -> Result:
    """The result of `work`; where the switch is set before, `work` is cancelled and this is `instead`."""
    task = asyncio.create_task(work)
    if switch is not None:
        switch.when_set(task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        own = asyncio.current_task()
        if switch is None or not switch.is_set or (own is not None and own.cancelling()):
            raise
        return instead


class RunningRequests:
    """All requests of one server that may be aborted, by tenant. One event loop owns it."""

    def __init__(self) -> None:
        self._running: dict[AbortSwitch, tuple[str, int | None]] = {}

    def begin(self, switch: AbortSwitch, tenant: str, session_id: int | None) -> None:
        """session_id: None or NO_SESSION for a request that only `abort_all` finds. Several may have the same one."""
        self._running[switch] = (tenant, None if session_id == NO_SESSION else session_id)

    def end(self, switch: AbortSwitch) -> None:
        self._running.pop(switch, None)

    def abort(self, tenant: str, session_id: int) -> bool:
        """Sets the switches of the tenant's requests with this number. False: there is none."""
        return self._set([switch for switch, key in self._running.items() if key == (tenant, session_id)])

    def abort_all(self, tenant: str) -> bool:
        return self._set([switch for switch, (owner, _) in self._running.items() if owner == tenant])

    def __len__(self) -> int:
        return len(self._running)

    def _set(self, switches: list[AbortSwitch]) -> bool:
        for switch in switches:
            switch.set()
        return bool(switches)


class TracksAborts:
    """Gives each HTTP request a switch, and forgets it when the request has ended, its stream included."""

    def __init__(self, app: ASGIApp, *, running: RunningRequests) -> None:
        self._app = app
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["abort_switch"] = switch = AbortSwitch()
        try:
            await self._app(scope, receive, send)
        finally:
            self._running.end(switch)


def switch_of(scope: Scope) -> AbortSwitch:
    switch: AbortSwitch = scope["abort_switch"]
    return switch
