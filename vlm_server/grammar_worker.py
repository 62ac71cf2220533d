"""The grammar worker: `python -m vlm_server.grammar_worker FD` reads one grammar after the other until the Unix socket FD closes.

A process of its own because some hundred bytes of a client's grammar can ask for any time and memory, in the middle of a library that
nothing but the process's end can stop. Its first frame holds the limits; it opens no file and reaches no network. Knows no tokens.
"""

import os
import resource
import signal
import socket
import sys

import msgspec

from engine.guided import STACK_BYTES, GrammarError, check_grammar
from vision.confinement import confine
from vision.frames import WORKER_NICENESS, Frame, receive_frame, send_frame, serve_frames

MAX_CPU_S = 2.0  # the largest grammars that can be followed take 0.3 s
MAX_MEMORY_BYTES = 512 << 20
MAX_COMPLAINT_CHARACTERS = 1000  # the library's own may hold the grammar, many times
_NUM_DESCRIPTORS = 64


class GrammarLimits(msgspec.Struct, frozen=True):
    cpu_s: float = MAX_CPU_S  # processor time of one grammar
    memory_bytes: int = MAX_MEMORY_BYTES  # beyond what the idle worker holds, and the stack


def main(fd: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends with the server, whose running requests may finish before
    connection = socket.socket(fileno=fd)
    limits = msgspec.msgpack.decode(receive_frame(connection).body, type=GrammarLimits)
    check_grammar('start: "a"')  # before memory is limited
    _limit_process(limits)
    _silence()
    send_frame(connection, Frame(msgspec.msgpack.encode(confine())))  # ready
    os.nice(WORKER_NICENESS)
    serve_frames(connection, lambda request: _answer(request, limits))


def _answer(request: Frame, limits: GrammarLimits) -> Frame:
    """What is wrong with the grammar, or None."""
    signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)  # its signal ends the process, in the middle of a computation too
    try:
        check_grammar(request.arrays["grammar"].numpy().tobytes().decode())
        complaint = None
    except GrammarError as error:
        complaint = str(error)[:MAX_COMPLAINT_CHARACTERS]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return Frame(msgspec.msgpack.encode(complaint))


def _limit_process(limits: GrammarLimits) -> None:
    with open("/proc/self/statm") as file:
        held_bytes = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held_bytes + STACK_BYTES + limits.memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_NUM_DESCRIPTORS,) * 2)


def _silence() -> None:
    """What the library prints as it ends would fill the server's log."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())


if __name__ == "__main__":
    main(int(sys.argv[1]))
