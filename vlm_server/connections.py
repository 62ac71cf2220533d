"""uvicorn's HTTP connections, with limits on how long and how much a client may hold one without getting on.

A request's head and body must arrive in time, an answer must be taken: otherwise the connection is cut, which cancels its request as any
client that leaves does. Knows nothing of routes or of what is sent.
"""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from vlm_server.config import ConnectionLimits

MAX_HEAD_BYTES = 64 << 10  # of what is no body: request line and headers, or trailers behind a body; the parser itself has no limit
MAX_PIPELINED = 64  # requests that are sent before earlier ones of their connection have their answers
MIN_TAKEN_BYTES = 32 << 10  # of a large answer, in each `send_s`: slow clients get on, one that takes a byte now and then does not


def limited_protocol(limits: ConnectionLimits) -> type[HttpToolsProtocol]:
    """What uvicorn makes its connections of."""

    class LimitedProtocol(_LimitedProtocol):
        _limits = limits

    return LimitedProtocol


class _Deadline:
    """Cuts a connection when it passes; set anew or cleared at any time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport) -> None:
        self._loop = loop
        self._transport = transport
        self._timer: asyncio.TimerHandle | None = None

    def set(self, after_s: float) -> None:
        self.clear()
        self._timer = self._loop.call_later(after_s, self._transport.abort)

    def clear(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Progress:
    """Cuts a connection whose client takes too little of what is written for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, limit_s: float) -> None:
        self._loop = loop
        self._transport = transport
        self._limit_s = limit_s
        self._timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """From now on, until `clear`."""
        self.clear()
        self._timer = self._loop.call_later(self._limit_s, self._check, self._transport.get_write_buffer_size())

    def clear(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self, num_unread_before: int) -> None:
        if num_unread_before - self._transport.get_write_buffer_size() >= MIN_TAKEN_BYTES:
            self.watch()
        else:
            self._transport.abort()


class _LingeringTransport:
    """What a request's answer is written to. Has all that the transport has, and closes it only when the body has arrived too.

    Who is cut off while they still send may never see the answer: the kernel throws it away with what was not read (RFC 9112, 9.6).
    """

    def __init__(self, transport: asyncio.Transport, is_body_expected: Callable[[], bool]) -> None:
        self._transport = transport
        self._is_body_expected = is_body_expected

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        if not self._is_body_expected():
            self._transport.close()


class _LimitedProtocol(HttpToolsProtocol):
    """At any time a connection waits for a head, for a body, or for its own server; and beside that for its answer to be read."""

    _limits: ConnectionLimits

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timeout_keep_alive = self._limits.keep_alive_s  # type: ignore[assignment]  # uvicorn knows whole seconds alone
        self._num_head_bytes = 0  # since the request began, or its body last went on
        self._in_head = True
        self._in_body = False
        self._has_body = False
        self._receiving = _Deadline(self.loop, transport)
        self._body = _Deadline(self.loop, transport)
        self._sending = _Progress(self.loop, transport, self._limits.send_s)
        self._receiving.set(self._limits.head_s)
        self._cycles: list[RequestResponseCycle] = []  # of requests that were sent before others had their answers

    def connection_lost(self, exc: Exception | None) -> None:
        for deadline in (self._receiving, self._body, self._sending):
            deadline.clear()
        super().connection_lost(exc)
        for cycle in self._cycles:  # uvicorn tells the last one alone
            cycle.disconnected = True
            cycle.message_event.set()
            cycle.transport = self.transport  # the other one knows this connection, which would wait for the cycle collector

    def data_received(self, data: bytes) -> None:
        self._num_head_bytes += len(data)
        super().data_received(data)
        if self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.abort()
        elif self._in_body:
            self._receiving.set(self._limits.body_pause_s)
        elif self._is_idle():
            self._keep_alive()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._num_head_bytes, self._has_body = True, 0, False
        self._receiving.set(self._limits.head_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Cookies mean nothing here, and reading them takes time that grows with the square of their length (CVE-2024-7592)."""
        if name.lower() != b"cookie":
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        self._receiving.set(self._limits.body_pause_s)
        self._body.set(self._limits.body_s)
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            self.transport.abort()
            raise httptools.HttpParserError("too many requests at once")  # or the parser goes on through what was received
        if self.cycle is not None:
            self.cycle.transport = cast(asyncio.Transport, _LingeringTransport(self.transport, self._is_body_expected))
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete]
        if self.cycle is not None and self.cycle not in self._cycles:
            self._cycles.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._has_body, self._num_head_bytes = True, 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        self._receiving.clear()
        self._body.clear()
        super().on_message_complete()
        if self.cycle is not None and self.cycle.response_complete and not self.cycle.keep_alive:
            self.transport.close()

    def _is_body_expected(self) -> bool:
        """Of a request that is answered already. Who waits to be told to go on does not send it."""
        cycle = self.cycle
        if cycle is None or not cycle.response_complete or not self._in_body:
            return False
        return self._has_body or not self.expect_100_continue

    def _is_idle(self) -> bool:
        is_answered = self.cycle is not None and self.cycle.response_complete and not self.pipeline
        return is_answered and not self._in_head and not self.transport.is_closing()

    def _keep_alive(self) -> None:
        """What came began no request, a line's end or the rest of a refused body, but uvicorn waits without limit since it came."""
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._sending.watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._sending.clear()

    def timeout_keep_alive_handler(self) -> None:
        """An answer that nobody took is not waited for either."""
        if self.transport.get_write_buffer_size():
            self._sending.watch()
        super().timeout_keep_alive_handler()
