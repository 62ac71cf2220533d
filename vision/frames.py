"""What the server and its picture workers say to each other over a Unix socket: msgpack frames, and beside them their arrays' descriptors.

A frame is 4 bytes of length (big-endian) and that many bytes of msgpack. Never pickle: a worker that was taken over must not be able to run
anything here. Knows nothing of what the frames are about, and of processes only that there is one at the other end.
"""

import array
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal, cast

import msgspec

from vision.image import MediaError
from vision.shared_array import SharedArray

MAX_FRAME_BYTES = 1 << 20
_MAX_DESCRIPTORS = 64
_WORKER_NICENESS = 10  # of workers once they serve: the steps of the engine come first
_LENGTH = struct.Struct(">I")
_ANCILLARY_BYTES = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)


_Number = Literal["bool", "uint8", "int16", "int32", "int64", "float16", "float32", "float64"]


class Failure(msgspec.Struct, frozen=True):
    """A MediaError on its way between processes."""

    code: str
    message: str
    status: int = 400

    def as_error(self) -> MediaError:
        return MediaError(self.code, self.message, status=self.status)


class NoDescriptorsError(OSError):
    """A whole frame came, and this process had no descriptors left for its arrays. Who sent it did nothing wrong; the next may come."""

    def __init__(self) -> None:
        super().__init__(errno.EMFILE, "no file descriptors are left for the arrays of a frame")


class _ArrayHeader(msgspec.Struct, frozen=True, array_like=True):
    """What names no memory of plain numbers is refused before a descriptor is handed over."""

    name: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)], ...]
    dtype: _Number


class _Header(msgspec.Struct, frozen=True):
    body: bytes
    arrays: tuple[_ArrayHeader, ...] = ()
    failure: Failure | None = None


@dataclass(slots=True, eq=False)
class Frame:
    """`body`: msgpack of what the two ends agreed on. Who holds the frame owns its arrays."""

    body: bytes = b""
    arrays: dict[str, SharedArray] = field(default_factory=dict)
    failure: Failure | None = None

    def close(self) -> None:
        for shared in self.arrays.values():
            shared.close()


def send_frame(connection: socket.socket, frame: Frame) -> None:
    """Blocks until all is sent, unless the socket does not block: then it must be empty. Keeps the frame's arrays."""
    headers = tuple(_ArrayHeader(name, shared.shape, cast(_Number, shared.dtype.name)) for name, shared in frame.arrays.items())
    payload = msgspec.msgpack.encode(_Header(frame.body, headers, frame.failure))
    assert len(payload) <= MAX_FRAME_BYTES, f"a frame of {len(payload)} bytes is too long"
    data = _LENGTH.pack(len(payload)) + payload
    num_sent = socket.send_fds(connection, [data], [shared.fd for shared in frame.arrays.values()])
    connection.sendall(data[num_sent:])


class FrameReader:
    """Puts one frame together from as many reads as it takes."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._data = bytearray()
        self._fds: list[int] = []
        self._has_lost_fds = False

    def read(self) -> Frame | None:
        """One read from the socket; the frame if that completed it.

        Raises EOFError when the other end closed, ValueError when it does not keep to the protocol, NoDescriptorsError in place of a frame.
        """
        data, fds, is_cut = _receive(self._connection)
        self._fds += fds
        self._data += data
        self._has_lost_fds |= is_cut
        if len(self._fds) + is_cut > _MAX_DESCRIPTORS:
            raise ValueError("a frame brings too many descriptors")
        if not data:
            raise EOFError("the other end closed")
        if len(self._data) < _LENGTH.size:
            return None
        (num_bytes,) = _LENGTH.unpack_from(self._data)
        if num_bytes > MAX_FRAME_BYTES or len(self._data) > _LENGTH.size + num_bytes:
            raise ValueError("a frame is too long")
        if len(self._data) < _LENGTH.size + num_bytes:
            return None
        return self._complete()

    def close(self) -> None:
        """Forgets an incomplete frame."""
        self._data.clear()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def _complete(self) -> Frame:
        header = msgspec.msgpack.decode(self._data[_LENGTH.size :], type=_Header)
        if self._has_lost_fds:
            raise NoDescriptorsError
        if len(header.arrays) != len(self._fds):
            raise ValueError("a frame does not bring one descriptor per array")
        arrays = {item.name: SharedArray(fd, item.shape, item.dtype) for item, fd in zip(header.arrays, self._fds, strict=True)}
        self._data.clear()
        self._fds.clear()
        return Frame(header.body, arrays, header.failure)


def receive_frame(connection: socket.socket) -> Frame:
    """The next frame of a blocking socket; raises as `FrameReader.read`."""
    reader = FrameReader(connection)
    try:
        while (frame := reader.read()) is None:
            pass
    finally:
        reader.close()
    return frame


def serve_frames(connection: socket.socket, answer: Callable[[Frame], Frame]) -> None:
    """A worker's life: answers one frame after the other until the other end closes. Closes both frames' arrays."""
    os.nice(_WORKER_NICENESS)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            request = receive_frame(connection)
            reply = answer(request)
            request.close()
            send_frame(connection, reply)
            reply.close()


def _receive(connection: socket.socket) -> tuple[bytes, list[int], bool]:
    """As `socket.recv_fds`, but the descriptors are not inherited by processes that are started meanwhile; and whether more were sent.

    The others are lost: there were more than _MAX_DESCRIPTORS, or this process had no room for them.
    """
    data, ancillary, flags, _ = connection.recvmsg(64 << 10, _ANCILLARY_BYTES, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
    fds = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds), bool(flags & socket.MSG_CTRUNC)
