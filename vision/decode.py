"""The decode worker: `python -m vision.decode FD` answers pictures' bytes with their pixels over the Unix socket FD until that closes.

A process of its own because its input is hostile: it loads Pillow and numpy only, has little memory, CPU time and few descriptors, opens
no file, reaches no network and no other process, and can be killed at any moment. Its first frame holds the limits. The server imports
this for their type; Pillow is loaded by the worker alone.
"""

import contextlib
import math
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator

import msgspec

from vision.confinement import confine
from vision.frames import WORKER_NICENESS, Failure, Frame, receive_frame, send_frame, serve_frames
from vision.image import MediaError

MEASURE = b"measure"  # body of a frame whose picture's size is asked for, not its pixels
_NUM_DESCRIPTORS = 64


class DecodeLimits(msgspec.Struct, frozen=True):
    max_pixels: int
    memory_bytes: int  # beyond what the idle worker holds
    cpu_s: float  # per picture


def main(fd: int) -> None:
    import vision.pixels  # noqa: F401  (before memory is limited)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends with the server, whose running requests may finish before
    connection = socket.socket(fileno=fd)
    limits = msgspec.msgpack.decode(receive_frame(connection).body, type=DecodeLimits)
    _limit_process(limits)
    _silence()
    send_frame(connection, Frame(msgspec.msgpack.encode(confine())))  # ready
    os.nice(WORKER_NICENESS)
    serve_frames(connection, lambda request: _answer(request, limits), sending=_descriptors_on_their_way)


def _answer(request: Frame, limits: DecodeLimits) -> Frame:
    from vision.pixels import decode_picture, measure_picture

    _limit_cpu(limits.cpu_s)
    data = request.arrays["data"].numpy().tobytes()
    try:
        if request.body == MEASURE:
            return Frame(msgspec.msgpack.encode(measure_picture(data, max_pixels=limits.max_pixels)))
        return Frame(arrays={"pixels": decode_picture(data, max_pixels=limits.max_pixels)})
    except MediaError as error:
        return Frame(failure=Failure(error.code, error.message, error.status))


def _limit_process(limits: DecodeLimits) -> None:
    with open("/proc/self/statm") as file:
        held_bytes = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held_bytes + limits.memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_descriptors(_NUM_DESCRIPTORS)


def _limit_descriptors(number: int | None = None) -> None:
    """None: as many as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most if number is None else number, most))


@contextlib.contextmanager
def _descriptors_on_their_way() -> Iterator[None]:
    """The kernel sends none (ETOOMANYREFS) where this user's processes have more under way than the sender may have open.

    All count that nobody has received yet: the pictures of a busy engine's requests too.
    """
    _limit_descriptors()
    try:
        yield
    finally:
        _limit_descriptors(_NUM_DESCRIPTORS)


def _silence() -> None:
    """What the decoders print about hostile files would fill the server's log."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())


def _limit_cpu(cpu_s: float) -> None:
    """The kernel ends the process when this picture takes longer, also when nobody is left to watch."""
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + cpu_s) + 1, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main(int(sys.argv[1]))
