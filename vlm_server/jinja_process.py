"""Renders Jinja chat templates in a process that can be killed, so that a hostile or slow template costs its own request and no more.

Knows nothing of tokenizers or of what messages mean. Its calls block; they belong in a thread.
"""

import contextlib
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import msgspec

from vision.workers import clean_environment
from vlm_server.jinja_worker import EXIT_MEMORY, RENDERED, RenderLimits, receive, send

logger = logging.getLogger(__name__)

WAIT_LIMIT_S = 20.0  # for one rendering, on however busy a machine; its processor time is limited by the worker
START_LIMIT_S = 60.0
_MAX_TRIES = 2  # of a prompt whose renderer is killed from outside

_MODULE = "vlm_server.jinja_worker"


class RenderError(Exception):
    """The template refuses the messages, or cannot be read: its own complaint."""


class RenderLimitError(RenderError):
    """The template took more time or memory than it is given."""


class RendererLostError(Exception):
    """There is no process to render with, or none is free: not the template's fault, and it may pass."""


class _KilledError(Exception):
    """Somebody else killed the worker; the template may have had no part in that."""


class JinjaProcess:
    """One worker, started by the first rendering and again after its end; renderings take turns.

    `close()` ends it; what is forgotten without it ends with this object.
    """

    def __init__(self, limits: RenderLimits | None = None) -> None:
        self._limits = limits or RenderLimits()
        self._turn = threading.Lock()
        self._worker: _Worker | None = None
        self._is_closed = False

    def render(
        self,
        source: str,
        messages: Sequence[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        variables: dict[str, Any],
    ) -> str:
        """The text that the template `source` writes, as the reference library renders it. Raises RenderError or RendererLostError."""
        request = {
            "source": source,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "variables": variables,
        }
        answer = self._answer(json.dumps(request).encode())
        if not answer.startswith(RENDERED):
            raise RenderError(answer[1:].decode())
        return answer[len(RENDERED) :].decode()

    def close(self) -> None:
        """Kills the worker; a rendering under way and later ones end with RendererLostError."""
        self._is_closed = True
        worker = self._worker
        if worker is not None:
            worker.end()

    def _answer(self, request: bytes) -> bytes:
        if not self._turn.acquire(timeout=WAIT_LIMIT_S):
            raise RendererLostError(f"other prompts took longer than {WAIT_LIMIT_S:g} s")
        try:
            for _ in range(_MAX_TRIES):
                with contextlib.suppress(_KilledError):
                    return self._exchanged(request)
            raise RendererLostError("its process is killed over and over")
        finally:
            self._turn.release()

    def _exchanged(self, request: bytes) -> bytes:
        try:
            if not self._is_closed and (self._worker is None or not self._worker.is_alive):
                self._worker = _Worker(self._limits)
            if self._is_closed or self._worker is None:
                raise EOFError  # after the worker was kept: `close()` kills the one that it finds
            return self._worker.exchange(request)
        except (OSError, EOFError) as error:
            raise self._ended(error) from None

    def _ended(self, error: Exception) -> Exception:
        """Ends the worker, and says what ended the rendering."""
        worker, self._worker = self._worker, None
        if self._is_closed:
            if worker is not None:
                worker.end()
            return RendererLostError("the server is ending")
        if worker is None:
            return RendererLostError(f"its process could not start: {error!r}")
        if isinstance(error, TimeoutError):
            worker.end()
            return RenderLimitError(f"it took longer than {WAIT_LIMIT_S:g} s")
        status = worker.end()
        if status == -signal.SIGPROF:
            return RenderLimitError(f"it took longer than {self._limits.cpu_s:g} s of processor time (--template-timeout-s)")
        if status == EXIT_MEMORY:
            return RenderLimitError(f"it needs more than {self._limits.memory_bytes >> 20} MiB")
        logger.warning("%s ended with status %s", _MODULE, status)
        return _KilledError() if status == -signal.SIGKILL else RenderLimitError(f"its process ended with status {status}")


class _Worker:
    """The process and our end of its socket. Raises OSError or EOFError where it cannot start."""

    def __init__(self, limits: RenderLimits) -> None:
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=clean_environment(),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # the terminal's interrupt is for the server
            )
        self._end = weakref.finalize(self, _end, self._process, self._connection)
        self._exchange(msgspec.json.encode(limits), START_LIMIT_S)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def exchange(self, request: bytes) -> bytes:
        return self._exchange(request, WAIT_LIMIT_S)

    def end(self) -> int:
        """Kills it where it lives; its exit status."""
        self._end()
        return self._process.wait()

    def _exchange(self, request: bytes, limit_s: float) -> bytes:
        deadline_s = time.monotonic() + limit_s
        self._connection.settimeout(limit_s)
        send(self._connection, request)
        return receive(self._connection, deadline_s=deadline_s)


def _end(process: "subprocess.Popen[bytes]", connection: socket.socket) -> None:
    process.kill()
    process.wait()
    connection.close()
