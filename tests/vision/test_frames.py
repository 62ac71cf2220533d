import errno
import gc
import os
import pickle
import socket
import struct
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from tests.vision.processes import descriptors_left, num_descriptors
from vision.frames import MAX_FRAME_BYTES, Failure, Frame, FrameReader, NoDescriptorsError, receive_frame, send_frame
from vision.shared_array import SharedArray


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_frame_arrives_with_its_arrays(ends: tuple[socket.socket, socket.socket]) -> None:
    values = np.arange(12, dtype=np.int16).reshape(3, 4)
    sent = Frame(b"body", {"a": SharedArray.copy_of(values), "b": SharedArray.create((0, 3), "uint8")})

    send_frame(ends[0], sent)
    sent.close()
    received = receive_frame(ends[1])

    assert (received.body, received.failure) == (b"body", None)
    assert np.array_equal(received.arrays["a"].numpy(), values)
    assert received.arrays["b"].numpy().shape == (0, 3)
    received.close()


def test_a_frame_in_many_pieces_is_put_together(ends: tuple[socket.socket, socket.socket]) -> None:
    frame = Frame(b"x" * 300, {"a": SharedArray.create((2,), "uint8")}, Failure("code", "message", 503))
    send_frame(ends[0], frame)
    data, fds, _, _ = socket.recv_fds(ends[1], 10_000, 1)
    ours, theirs = socket.socketpair()
    reader = FrameReader(theirs)

    received = None
    for at in range(len(data)):
        assert received is None
        socket.send_fds(ours, [data[at : at + 1]], fds if at == 7 else [])
        received = reader.read()

    assert received is not None
    assert (received.body, received.failure) == (frame.body, frame.failure)
    received.close()
    frame.close()
    os.close(fds[0])
    ours.close()
    theirs.close()


def test_descriptors_are_not_inherited_by_other_processes(ends: tuple[socket.socket, socket.socket]) -> None:
    send_frame(ends[0], Frame(arrays={"a": SharedArray.create((1,), "uint8")}))

    assert not os.get_inheritable(receive_frame(ends[1]).arrays["a"].fd)


def test_the_end_of_the_other_side_is_noticed(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[0].close()

    with pytest.raises(EOFError):
        receive_frame(ends[1])


@pytest.mark.parametrize(
    "payload",
    [
        struct.pack(">I", MAX_FRAME_BYTES + 1),
        struct.pack(">I", 2) + b"abc",
        struct.pack(">I", 3) + b"abc",
        struct.pack(">I", len(pickle.dumps(1))) + pickle.dumps(1),
        struct.pack(">I", len(body := msgspec.msgpack.encode({"body": b"", "arrays": [["a", [1], "uint8"]]}))) + body,
    ],
)
def test_what_breaks_the_protocol_is_refused_and_nothing_stays_open(ends: tuple[socket.socket, socket.socket], payload: bytes) -> None:
    before = num_descriptors()
    with SharedFd() as fd:
        socket.send_fds(ends[0], [payload], [fd, fd])

    with pytest.raises(ValueError):
        receive_frame(ends[1])

    assert num_descriptors() == before


class SharedFd:
    def __enter__(self) -> int:
        self.array = SharedArray.create((1,), "uint8")
        return self.array.fd

    def __exit__(self, *_: object) -> None:
        self.array.close()


def test_more_descriptors_than_allowed_are_refused_in_pieces_too(ends: tuple[socket.socket, socket.socket]) -> None:
    before = num_descriptors()
    with SharedFd() as fd:
        for byte in b"\x00\x00\x00":
            socket.send_fds(ends[0], [bytes([byte])], [fd] * 30)

    with pytest.raises(ValueError, match="too many"):
        receive_frame(ends[1])

    assert num_descriptors() == before


@pytest.mark.parametrize("item", [["a", [1], "nonsense"], ["a", [1], "object"], ["a", [-1], "uint8"], ["a", [1 << 63], "uint8"]])
def test_an_array_of_no_plain_numbers_is_refused_and_its_descriptor_closed_once(
    ends: tuple[socket.socket, socket.socket], item: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the second time, the number could be another file's."""
    payload = msgspec.msgpack.encode({"body": b"", "arrays": [item]})
    closed: list[int] = []
    close = os.close
    with SharedFd() as fd:
        socket.send_fds(ends[0], [struct.pack(">I", len(payload)) + payload], [fd])
    monkeypatch.setattr(os, "close", lambda fd: closed.append(fd) or close(fd))

    with pytest.raises(ValueError):
        receive_frame(ends[1])

    gc.collect()
    assert len(closed) == 1


def test_more_descriptors_than_allowed_are_refused(ends: tuple[socket.socket, socket.socket]) -> None:
    before = num_descriptors()
    with SharedFd() as fd:
        socket.send_fds(ends[0], [b"\x00\x00\x00\x01a"], [fd] * 200)

    with pytest.raises(ValueError, match="too many"):
        receive_frame(ends[1])

    assert num_descriptors() == before


@pytest.mark.parametrize("num_left", [0, 1])
def test_a_frame_that_finds_no_descriptors_is_dropped_whole_and_the_next_one_comes(
    ends: tuple[socket.socket, socket.socket], num_left: int
) -> None:
    send_frame(ends[0], Frame(b"x" * (100 << 10), {name: SharedArray.create((1,), "uint8") for name in "ab"}))
    before = num_descriptors()

    with descriptors_left(num_left), pytest.raises(NoDescriptorsError) as caught:
        receive_frame(ends[1])

    assert (caught.value.errno, num_descriptors()) == (errno.EMFILE, before)
    send_frame(ends[0], Frame(b"next"))
    assert receive_frame(ends[1]).body == b"next"
