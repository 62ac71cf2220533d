"""The decode worker: `python -m vision.decode FD` answers pictures' bytes with their pixels over the Unix socket FD until that closes.

A process of its own because its input is hostile: it loads Pillow and numpy only, has little memory, CPU time and few descriptors, and can
be killed at any moment. Its first frame holds the limits. The server imports this for their type; Pillow is loaded by the worker alone.
"""

import math
import resource
import socket
import sys
import time

import msgspec

from vision.frames import Failure, Frame, receive_frame, send_frame
from vision.image import MediaError

_NUM_DESCRIPTORS = 64


class DecodeLimits(msgspec.Struct, frozen=True):
    max_pixels: int
    memory_bytes: int  # beyond what the idle worker holds
    cpu_s: float  # per picture


def main(fd: int) -> None:
    from vision.pixels import decode_picture

    connection = socket.socket(fileno=fd)
    limits = msgspec.msgpack.decode(receive_frame(connection).body, type=DecodeLimits)
    _limit_process(limits)
    send_frame(connection, Frame())  # ready
    while True:
        try:
            request = receive_frame(connection)
        except EOFError:
            return
        _limit_cpu(limits.cpu_s)
        try:
            pixels = decode_picture(request.arrays["data"].numpy().tobytes(), max_pixels=limits.max_pixels)
            reply = Frame(arrays={"pixels": pixels})
        except MediaError as error:
            reply = Frame(failure=Failure(error.code, error.message, error.status))
        request.close()
        send_frame(connection, reply)
        reply.close()


def _limit_process(limits: DecodeLimits) -> None:
    with open("/proc/self/statm") as file:
        held_bytes = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held_bytes + limits.memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_NUM_DESCRIPTORS,) * 2)


def _limit_cpu(cpu_s: float) -> None:
    """The kernel ends the process when this picture takes longer, also when nobody is left to watch."""
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + cpu_s) + 1, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main(int(sys.argv[1]))
