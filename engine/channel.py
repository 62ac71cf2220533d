"""Frames over a Unix socket: a typed message as msgpack, and the file descriptors of the arrays in it. Never pickle.

A frame is a header and its payload. Its descriptors come before it, in pieces with a header each. Headers say how many there are, so that
what was lost, and what is left of a frame that was never finished, is known as such: no message ever gets another one's arrays.

The blocking side (`Channel`) serves the engine process and its ranks; `AsyncSender` and `read_frame` serve an event loop.
"""

import asyncio
import contextlib
import errno
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from vision.shared_array import SharedArray

_HEADER = struct.Struct("<II")  # payload bytes, descriptors of the frame; in a piece of them no bytes, and the descriptors beside it
_MAX_FDS_AT_ONCE = 200  # the kernel allows 253
_MAX_PAYLOAD_BYTES = 1 << 30
_LOST = -1

# Of one user the kernel lets only so many descriptors be on their way (RLIMIT_NOFILE). The engine takes them in between two steps.
IN_FLIGHT_PAUSE_S = 0.005
MAX_IN_FLIGHT_WAIT_S = 5.0

T = TypeVar("T")


def encode(message: Any) -> tuple[bytes, list[SharedArray]]:
    """The payload, and its arrays in its order; they stay open when those of the message are closed."""
    arrays: list[SharedArray] = []

    def replace_array(value: Any) -> Any:
        if not isinstance(value, SharedArray):
            raise TypeError(f"{type(value).__name__} cannot be sent")
        arrays.append(value.duplicate())
        return (value.dtype.name, value.shape)

    return msgspec.msgpack.encode(message, enc_hook=replace_array), arrays


class Decoder:
    """Payloads of one type (a union of tagged structs) back into messages. Arrays whose descriptors were lost are closed ones."""

    def __init__(self, message_type: Any) -> None:
        self._fds: deque[int] = deque()  # of the payload that is being decoded
        self._decoder = msgspec.msgpack.Decoder(message_type, dec_hook=self._restore_array)

    def decode(self, payload: bytes | memoryview, fds: Sequence[int] = ()) -> Any:
        """Takes over the descriptors, one per array in the payload's order."""
        self._fds.extend(fds)
        try:
            return self._decoder.decode(payload)
        finally:
            _close(self._fds)
            self._fds.clear()

    def _restore_array(self, expected: type, value: Any) -> Any:
        if expected is not SharedArray:
            raise TypeError(f"{expected.__name__} cannot be received")
        dtype, shape = value
        return SharedArray(self._fds.popleft() if self._fds else _LOST, shape, dtype)


class Channel:
    """The blocking end. Raises EOFError when the other end is gone."""

    def __init__(self, sock: socket.socket, message_type: Any) -> None:
        sock.setblocking(True)
        self._socket = sock
        self._decoder = Decoder(message_type)
        self._buffer = bytearray()
        self._arrived: deque[list[int]] = deque()  # descriptors of each piece whose header is in the buffer
        self._fds: list[int] = []  # of the pieces before the next frame

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Any) -> None:
        payload, arrays = encode(message)
        try:
            for piece in _pieces(arrays):
                socket.send_fds(self._socket, [_HEADER.pack(0, len(piece))], piece)
            self._socket.sendall(_HEADER.pack(len(payload), len(arrays)) + payload)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EOFError from error

    def receive(self, timeout_s: float | None) -> Any | None:
        """The next message; None when none came in time. `timeout_s` None waits for ever."""
        while (message := self._next()) is None:
            if not _is_readable(self._socket, timeout_s):
                return None
            self._read()
        return message

    def close(self) -> None:
        self._socket.close()
        _close([fd for fds in (*self._arrived, self._fds) for fd in fds])
        self._arrived.clear()
        self._fds.clear()

    def _read(self) -> None:
        """One read ends behind the first header that brings descriptors. Of those that there is no room for, the process is told."""
        try:
            data, fds, flags, _ = socket.recv_fds(self._socket, 1 << 18, _MAX_FDS_AT_ONCE)
        except ConnectionResetError as error:
            raise EOFError from error
        if fds or flags & socket.MSG_CTRUNC:
            self._arrived.append(fds)
        if not data:
            raise EOFError("the other process closed the channel")
        self._buffer += data

    def _next(self) -> Any | None:
        while len(self._buffer) >= _HEADER.size:
            num_bytes, num_fds = _HEADER.unpack_from(self._buffer)
            if len(self._buffer) < _HEADER.size + num_bytes:
                return None
            payload = bytes(self._buffer[_HEADER.size : _HEADER.size + num_bytes])
            del self._buffer[: _HEADER.size + num_bytes]
            if payload:
                return self._decoder.decode(payload, self._take_fds(num_fds))
            arrived = self._arrived.popleft()
            self._fds += [*arrived, *[_LOST] * (num_fds - len(arrived))]
        return None

    def _take_fds(self, num_fds: int) -> list[int]:
        """A frame's own, which came last; those before them are of one that was given up."""
        first = max(0, len(self._fds) - num_fds)
        own, left_over = self._fds[first:], self._fds[:first]
        self._fds = []
        _close(left_over)
        return own


class AsyncSender:
    """The event loop's sending end of a non-blocking socket; messages never interleave."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._lock = asyncio.Lock()
        self._sending: asyncio.Future[None] | None = None
        self._is_closed = False

    async def send(self, message: Any) -> None:
        """A frame that was begun is finished when the caller is cancelled, too: half of one would garble all that follows.

        Waits briefly while too many descriptors are on their way, and lets others go first meanwhile. Raises OSError where that takes too
        long (ETOOMANYREFS), or the other end, or this one, is closed.
        """
        payload, arrays = encode(message)  # now: the message's may be closed while this waits
        loop = asyncio.get_running_loop()
        until_s = loop.time() + MAX_IN_FLIGHT_WAIT_S
        while True:
            try:
                await self._send_next(payload, arrays)
                return
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS or loop.time() >= until_s:
                    raise
            await asyncio.sleep(IN_FLIGHT_PAUSE_S)

    async def send_in_order(self, message: Any) -> None:
        """As `send`, but nothing that is sent later goes first: ETOOMANYREFS is raised at once."""
        await self._send_next(*encode(message))

    def close(self) -> None:
        """What is still being sent fails: nothing would wake it once its socket is closed."""
        self._is_closed = True
        if self._sending is None or self._sending.done():
            self._socket.close()
            return
        self._sending.cancel()
        self._sending.add_done_callback(lambda done: self._socket.close())  # not while the loop knows the number, which others may get

    async def _send_next(self, payload: bytes, arrays: Sequence[SharedArray]) -> None:
        """One frame, when it is its turn: until then nothing of it is sent where the caller is cancelled."""
        await self._lock.acquire()
        sending = self._sending = asyncio.ensure_future(self._send(payload, arrays))
        sending.add_done_callback(lambda done: self._lock.release())
        sending.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to ask
        await asyncio.wait((sending,))
        if sending.cancelled():
            raise BrokenPipeError("the channel was closed")
        sending.result()

    async def _send(self, payload: bytes, arrays: Sequence[SharedArray]) -> None:
        if self._is_closed:
            raise BrokenPipeError("the channel was closed")
        for piece in _pieces(arrays):
            await self._send_fds(piece)
        try:
            await asyncio.get_running_loop().sock_sendall(self._socket, _HEADER.pack(len(payload), len(arrays)) + payload)
        except OSError:
            self._end()
            raise

    def _end(self) -> None:
        """A part of a payload may be gone, and nothing behind it could be read."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    async def _send_fds(self, fds: list[int]) -> None:
        """A header alone: so few bytes that they leave whole or not at all. The other end drops them where no payload follows."""
        while True:
            try:
                socket.send_fds(self._socket, [_HEADER.pack(0, len(fds))], fds)
                return
            except BlockingIOError:
                await _writable(self._socket)


def _is_readable(sock: socket.socket, timeout_s: float | None) -> bool:
    """Data or an end came in time. Unlike `select`, `poll` takes descriptors above 1023: a busy server's children inherit such."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else 1000 * timeout_s))


def _pieces(arrays: Sequence[SharedArray]) -> list[list[int]]:
    """Their descriptors, as many at once as can be sent."""
    fds = [array.fd for array in arrays]
    return [fds[start : start + _MAX_FDS_AT_ONCE] for start in range(0, len(fds), _MAX_FDS_AT_ONCE)]


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        if fd != _LOST:
            os.close(fd)


async def _writable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_writer(sock, _set, ready)
    try:
        await ready
    finally:
        loop.remove_writer(sock)


def _set(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """One payload from a stream that carries no descriptors. Raises asyncio.IncompleteReadError at its end."""
    num_bytes, _ = _HEADER.unpack(await reader.readexactly(_HEADER.size))
    if num_bytes > _MAX_PAYLOAD_BYTES:
        raise ValueError(f"a frame of {num_bytes} bytes")
    return await reader.readexactly(num_bytes)
