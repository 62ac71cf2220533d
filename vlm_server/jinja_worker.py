"""The template worker: `python -m vlm_server.jinja_worker FD` renders one Jinja chat template after the other until the socket FD closes.

A process of its own because a template is a program that came with a checkpoint: however it is written, it ends within its processor
time and its memory, or this process does; were it to leave the reference library's sandbox, it would find no file and no network. Knows
no tokenizer and no model.
"""

import contextlib
import json
import os
import signal
import socket
import struct
import sys
import time
from typing import Any

import msgspec

from vision.confinement import confine
from vision.worker_start import limit_process

LENGTH = struct.Struct(">Q")
RENDERED, REFUSED = b"+", b"-"  # an answer's first byte; after it the text, or what the template complained about
EXIT_MEMORY = 3

_MAX_COMPLAINT_CHARACTERS = 1000
_WARM_UP = (
    "{% macro f(x) %}{{ x | tojson }}{% endmacro %}{{ f(messages) }}{{ strftime_now('%c %Z') }}{% generation %}{% endgeneration %}",
    "{{ raise_exception('no') }}",
    "{{ messages.missing.missing }}",
    "{% for",
)


class RenderLimits(msgspec.Struct, frozen=True):
    cpu_s: float = 3.0  # processor time of one rendering
    memory_bytes: int = 1 << 30  # beyond what the idle worker holds
    max_characters: int = 64 << 20  # of the text


def main(fd: int) -> None:
    import transformers.utils.chat_template_utils  # noqa: F401  (before memory is limited)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends with the server, whose running requests may finish before
    connection = socket.socket(fileno=fd)
    limits = msgspec.json.decode(receive(connection), type=RenderLimits)
    limit_process(memory_bytes=limits.memory_bytes)
    _load_all()
    confine()
    send(connection, b"")  # ready
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            send(connection, _answer(receive(connection), limits))


def send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket, *, deadline_s: float | None = None) -> bytes:
    """The next piece of data. Raises EOFError when the other end closed, TimeoutError at the deadline (of `time.monotonic`)."""
    (length,) = LENGTH.unpack(_exactly(connection, LENGTH.size, deadline_s))
    return _exactly(connection, length, deadline_s)


def _exactly(connection: socket.socket, length: int, deadline_s: float | None) -> bytes:
    data = bytearray()
    while len(data) < length:
        if deadline_s is not None:
            connection.settimeout(max(0.001, deadline_s - time.monotonic()))
        piece = connection.recv(min(length - len(data), 1 << 20))
        if not piece:
            raise EOFError("the other end closed")
        data += piece
    return bytes(data)


def _answer(request: bytes, limits: RenderLimits) -> bytes:
    signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)  # its signal ends the process, in the middle of a computation too
    try:
        text = _render(**json.loads(request))
        if len(text) > limits.max_characters:
            return REFUSED + f"it wrote more than {limits.max_characters} characters".encode()
        return RENDERED + text.encode()
    except MemoryError:
        os._exit(EXIT_MEMORY)
    except Exception as error:  # whatever a template does wrong is its own complaint
        complaint = str(error) or type(error).__name__
        return REFUSED + complaint[:_MAX_COMPLAINT_CHARACTERS].encode(errors="replace")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _render(source: str, messages: list[Any], variables: dict[str, Any], **options: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template([messages], chat_template=source, **options, **variables)
    return str(texts[0])


def _load_all() -> None:
    """What rendering reads from files: modules that Jinja imports when they are needed, those of errors among them, and the time zone."""
    for source in _WARM_UP:
        with contextlib.suppress(Exception):
            _render(source, [{"role": "user", "content": "x"}], {}, tools=None)


if __name__ == "__main__":
    main(int(sys.argv[1]))
