"""The grammar worker: `python -m vlm_server.grammar_worker FD` reads one grammar after the other until the Unix socket FD closes.

A process of its own because some hundred bytes of a client's grammar can ask for any time and memory, in the middle of a library that
nothing but the process's end can stop. Its first frame holds the limits; it opens no file and reaches no network. Knows no tokens.
"""

import signal
import sys

import msgspec

from engine.guided import STACK_BYTES, GrammarError, check_grammar
from vision.frames import Frame
from vision.worker_start import serve_confined, start_worker

MAX_CPU_S = 2.0  # the largest grammars that can be followed take 0.3 s
MAX_MEMORY_BYTES = 512 << 20
MAX_COMPLAINT_CHARACTERS = 1000  # the library's own may hold the grammar, many times


class GrammarLimits(msgspec.Struct, frozen=True):
    cpu_s: float = MAX_CPU_S  # processor time of one grammar
    memory_bytes: int = MAX_MEMORY_BYTES  # beyond what the idle worker holds, and the stack


def main(fd: int) -> None:
    connection, limits = start_worker(fd, GrammarLimits)
    check_grammar('start: "a"')  # before memory is limited
    memory_bytes = STACK_BYTES + limits.memory_bytes
    serve_confined(connection, lambda request: _answer(request, limits), memory_bytes=memory_bytes, file_bytes=0)


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


if __name__ == "__main__":
    main(int(sys.argv[1]))
