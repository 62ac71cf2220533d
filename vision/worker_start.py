"""How a worker process starts: its settings, its limits, silence and confinement, in this order, and then its first job.

The workers' end of what `workers.py` starts. Knows nothing of what they do; what they need from files is loaded before they are confined.
"""

import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from typing import TypeVar

import msgspec

from vision.confinement import confine
from vision.frames import Frame, receive_frame, send_frame, serve_frames

Settings = TypeVar("Settings")

_NUM_DESCRIPTORS = 64


def start_worker(fd: int, settings_type: type[Settings]) -> tuple[socket.socket, Settings]:
    """The socket of a worker's frames, and what the first one holds. Raises as `receive_frame`."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends with the server, whose running requests may finish before
    connection = socket.socket(fileno=fd)
    return connection, msgspec.msgpack.decode(receive_frame(connection).body, type=settings_type)


def serve_confined(connection: socket.socket, answer: Callable[[Frame], Frame], *, memory_bytes: int, file_bytes: int) -> None:
    """As `serve_frames`, once the process is limited and confined; the ready frame says which of `confinement.ALL` was granted."""
    limit_process(memory_bytes=memory_bytes, file_bytes=file_bytes)
    _silence()
    send_frame(connection, Frame(msgspec.msgpack.encode(confine())))  # ready
    serve_frames(connection, answer)


def limit_process(*, memory_bytes: int, file_bytes: int | None = None) -> None:
    """memory_bytes: beyond what the process holds now. file_bytes: of each file that it writes, shared memory too; None: no limit."""
    with open("/proc/self/statm") as file:
        held_bytes = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held_bytes + memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_NUM_DESCRIPTORS,) * 2)


def _silence() -> None:
    """What libraries print about hostile data, or as they end over it, would fill the server's log."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
