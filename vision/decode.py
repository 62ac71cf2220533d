"""The decode worker: `python -m vision.decode FD` answers pictures' bytes with their pixels over the Unix socket FD until that closes.

A process of its own because its input is hostile: it loads Pillow and numpy only, has little memory, CPU time and few descriptors, opens
no file, reaches no network and no other process, and can be killed at any moment. Its first frame holds the limits. Each picture comes
with the shared memory for its pixels: the worker could not send any, as the kernel compares what all of a user's processes have sent and
nobody has received yet with the descriptors that the sender may have. The server imports this for its types; Pillow is loaded by the
worker alone.
"""

import math
import resource
import sys
import time

import msgspec

from vision.frames import Failure, Frame
from vision.image import MediaError
from vision.worker_start import serve_confined, start_worker

MEASURE = b"measure"  # body of a frame whose picture's size is asked for, not its pixels


class DecodeLimits(msgspec.Struct, frozen=True):
    max_pixels: int
    memory_bytes: int  # beyond what the idle worker holds
    cpu_s: float  # per picture


def main(fd: int) -> None:
    import vision.pixels  # noqa: F401  (before memory is limited)

    connection, limits = start_worker(fd, DecodeLimits)
    file_bytes = 3 * limits.max_pixels  # of the pixels' shared memory
    serve_confined(connection, lambda request: _answer(request, limits), memory_bytes=limits.memory_bytes, file_bytes=file_bytes)


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


def _limit_cpu(cpu_s: float) -> None:
    """The kernel ends the process when this picture takes longer, also when nobody is left to watch."""
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + cpu_s) + 1, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main(int(sys.argv[1]))
