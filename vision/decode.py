"""The decode worker: `python -m vision.decode FD` answers pictures' bytes with their pixels over the Unix socket FD until that closes.

A process of its own because its input is hostile: it loads Pillow and numpy only, has little memory, CPU time and few descriptors, opens
no file, reaches no network and no other process, and can be killed at any moment. Its first frame holds the limits. Each picture comes
with the shared memory for its pixels: the worker could not send any, as the kernel compares what all of a user's processes have sent and
nobody has received yet with the descriptors that the sender may have. The server imports this for its types; Pillow is loaded by the
worker alone.
"""

import math
import os
import resource
import signal
import socket
import sys
import time

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
    serve_frames(connection, lambda request: _answer(request, limits))


def _answer(request: Frame, limits: DecodeLimits) -> Frame:
    from vision.pixels import decode_picture, measure_picture

    _limit_cpu(limits.cpu_s)
    data = request.arrays["data"].numpy().tobytes()
    try:
        if request.body == MEASURE:
            return Frame(msgspec.msgpack.encode(measure_picture(data, max_pixels=limits.max_pixels)))
        pixels = request.arrays["pixels"]
        decode_picture(data, pixels, max_pixels=limits.max_pixels)
        return Frame(msgspec.msgpack.encode(pixels.shape[:2]))
    except MediaError as error:
        return Frame(failure=Failure(error.code, error.message, error.status))


def _limit_process(limits: DecodeLimits) -> None:
    with open("/proc/self/statm") as file:
        held_bytes = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held_bytes + limits.memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * limits.max_pixels,) * 2)  # of shared memory too
    resource.setrlimit(resource.RLIMIT_NOFILE, (_NUM_DESCRIPTORS,) * 2)


def _silence() -> None:
    """What the decoders print about hostile files would fill the server's log."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())


def _limit_cpu(cpu_s: float) -> None:
    """The kernel ends the process when this picture takes longer, also when nobody is left to watch."""
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + cpu_s) + 1, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main(int(sys.argv[1]))
