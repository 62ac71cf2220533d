"""Frames over a Unix socket: a typed message as msgpack, and the file descriptors of the arrays in it. Never pickle.

The blocking side (`Channel`) serves the engine process and its ranks; `AsyncSender` and `read_frame` serve an event loop.
"""

import asyncio
import contextlib
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from vision.shared_array import SharedArray

_HEADER = struct.Struct("<IH")  # payload bytes, descriptors that came with this frame or just before it
_MAX_FDS_AT_ONCE = 200  # the kernel allows 253
_MAX_PAYLOAD_BYTES = 1 << 30

T = TypeVar("T")


def encode(message: Any) -> tuple[bytes, list[int]]:
    """The payload, and the descriptors of its arrays in the order of the payload. They still belong to the message."""
    fds: list[int] = []

    def replace_array(value: Any) -> Any:
        if not isinstance(value, SharedArray):
            raise TypeError(f"{type(value).__name__} cannot be sent")
        fds.append(value.fd)
        return (value.dtype.name, value.shape)

    return msgspec.msgpack.encode(message, enc_hook=replace_array), fds


class Decoder:
    """Payloads of one type (a union of tagged structs) back into messages, taking descriptors as arrays name them."""

    def __init__(self, message_type: Any) -> None:
        self._fds: deque[int] = deque()
        self._decoder = msgspec.msgpack.Decoder(message_type, dec_hook=self._restore_array)

    def add_fds(self, fds: list[int]) -> None:
        self._fds.extend(fds)

    def decode(self, payload: bytes | memoryview) -> Any:
        return self._decoder.decode(payload)

    def _restore_array(self, expected: type, value: Any) -> Any:
        if expected is not SharedArray:
            raise TypeError(f"{expected.__name__} cannot be received")
        dtype, shape = value
        return SharedArray(self._fds.popleft(), shape, dtype)


class Channel:
    """The blocking end. Raises EOFError when the other end is gone."""

    def __init__(self, sock: socket.socket, message_type: Any) -> None:
        sock.setblocking(True)
        self._socket = sock
        self._decoder = Decoder(message_type)
        self._buffer = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Any) -> None:
        payload, fds = encode(message)
        try:
            for start in range(0, len(fds), _MAX_FDS_AT_ONCE):
                socket.send_fds(self._socket, [_HEADER.pack(0, 1)], fds[start : start + _MAX_FDS_AT_ONCE])
            self._socket.sendall(_HEADER.pack(len(payload), 0) + payload)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EOFError from error

    def receive(self, timeout_s: float | None) -> Any | None:
        """The next message; None when none came in time. `timeout_s` None waits for ever."""
        while (message := self._next()) is None:
            if not select.select([self._socket], [], [], timeout_s)[0]:
                return None
            self._read()
        return message

    def close(self) -> None:
        self._socket.close()

    def _read(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, 1 << 18, _MAX_FDS_AT_ONCE)
        except ConnectionResetError as error:
            raise EOFError from error
        self._decoder.add_fds(fds)
        if not data:
            raise EOFError("the other process closed the channel")
        self._buffer += data

    def _next(self) -> Any | None:
        while len(self._buffer) >= _HEADER.size:
            num_bytes, carries_fds = _HEADER.unpack_from(self._buffer)
            if len(self._buffer) < _HEADER.size + num_bytes:
                return None
            payload = bytes(self._buffer[_HEADER.size : _HEADER.size + num_bytes])
            del self._buffer[: _HEADER.size + num_bytes]
            if not carries_fds:
                return self._decoder.decode(payload)
        return None


class AsyncSender:
    """The event loop's sending end of a non-blocking socket; messages never interleave."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._lock = asyncio.Lock()
        self._sendings: set[asyncio.Future[None]] = set()

    async def send(self, message: Any) -> None:
        """A frame that was begun is finished when the caller is cancelled, too: half of one would garble all that follows.

        Raises OSError where the other end, or this one, is closed.
        """
        sending = asyncio.ensure_future(self._send(message))
        self._sendings.add(sending)
        sending.add_done_callback(self._sendings.discard)
        sending.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to ask
        await asyncio.wait((sending,))
        if sending.cancelled():
            raise BrokenPipeError("the channel was closed")
        sending.result()

    def close(self) -> None:
        """What is still being sent fails: nothing would wake it once its socket is closed."""
        for sending in tuple(self._sendings):
            sending.cancel()
        self._socket.close()

    async def _send(self, message: Any) -> None:
        payload, fds = encode(message)
        with _own_descriptors(fds) as own:  # the message's may be closed, and their numbers used again, while this waits
            async with self._lock:
                for start in range(0, len(own), _MAX_FDS_AT_ONCE):
                    await self._send_fds(own[start : start + _MAX_FDS_AT_ONCE])
                await asyncio.get_running_loop().sock_sendall(self._socket, _HEADER.pack(len(payload), 0) + payload)

    async def _send_fds(self, fds: list[int]) -> None:
        """A header alone: so few bytes that they leave whole or not at all."""
        while True:
            try:
                socket.send_fds(self._socket, [_HEADER.pack(0, 1)], fds)
                return
            except BlockingIOError:
                await _writable(self._socket)


@contextlib.contextmanager
def _own_descriptors(fds: list[int]) -> Iterator[list[int]]:
    own: list[int] = []
    try:
        for fd in fds:
            own.append(os.dup(fd))
        yield own
    finally:
        for fd in own:
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
