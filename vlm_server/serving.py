"""Runs one server in this process until it is told to stop: binds first, loads, says when it is ready. The only place that prints."""

import asyncio
import contextlib
import logging
import math
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from engine.garbage import spare_loaded_objects
from engine.log_lines import JSON
from engine.request import EngineError
from vlm_server.api_keys import is_open_to_others
from vlm_server.app import create_app
from vlm_server.auth import KeyRing
from vlm_server.backend import Backend, open_backend
from vlm_server.config import ServerConfig
from vlm_server.connections import limited_protocol
from vlm_server.readiness import Readiness
from vlm_server.sessions.opening import open_store
from vlm_server.sessions.store import RecordStore, StoreError
from vlm_server.tls import OLDEST_VERSION

logger = logging.getLogger(__name__)

_MAX_DESCRIPTORS = 65536
LEAVING_S = 3.0  # for threads that are still at work when all is closed
_HEARING_S = 0.2  # for requests that were on their way when the server stopped listening

_ANYWHERE = ("0.0.0.0", "::", "")


class ServingError(Exception):
    """The server could not start; the message says why."""


def serve(config: ServerConfig) -> None:
    """Blocks until the server is stopped by a signal, then at most LEAVING_S: it may end the process. Raises ServingError."""
    if config.server_name in _ANYWHERE and not config.needs_key:
        logger.warning(
            "listening on every address without API keys: whoever reaches port %d can use the model and make this server fetch "
            "pictures; set --api-keys, or --server-name 127.0.0.1",
            config.server_port,
        )
    for file in filter(is_open_to_others, config.api_key_files):
        logger.warning("%s, the file of the API keys, can be read or changed by every user of this machine: chmod 600", file)
    _allow_descriptors()
    with _listener(config) as listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_run(config, listener))


def _allow_descriptors() -> None:
    """Connections and pictures in memory take one each; many systems begin with 1024, for programs that use `select`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _run(config: ServerConfig, listener: socket.socket) -> None:
    started_s = time.monotonic()
    progress = ProgressLine(f"Loading {config.model_root}", is_logged=config.engine.log_format == JSON)
    if config.api_key_files:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: None)  # they are read when all is loaded
    try:
        async with contextlib.AsyncExitStack() as stack:
            try:
                store = await stack.enter_async_context(open_store(config.session_store))
                backend = await stack.enter_async_context(open_backend(config, on_progress=progress.show))
            except StoreError as error:
                raise ServingError(f"--session-store: {error}") from error
            except (EngineError, OSError, ValueError) as error:
                raise ServingError(f"{config.model_root} cannot be served: {error}") from error
            finally:
                progress.close()
            url = _url(listener, "https" if config.tls else "http")
            ready = f"Ready in {time.monotonic() - started_s:.0f} s: {config.model_name} at {url} ({_places(config, url)})"
            server = _Server(config, backend, store, ready)
            await server.serve(sockets=[listener])
            if server.force_exit:
                backend.kill_engine()  # which would finish its step
        _leave_within(0.0 if server.force_exit else LEAVING_S)
    finally:
        progress.close()


def _leave_within(limit_s: float) -> None:
    """All is closed: exits with 0, also while a thread that looks up a name somewhere would be waited for."""

    def leave() -> None:
        sys.stderr.flush()
        os._exit(0)

    timer = threading.Timer(limit_s, leave)
    timer.daemon = True
    timer.start()


def _places(config: ServerConfig, url: str) -> str:
    """What a user opens next."""
    chat = f"chat at {url}/ui, " if config.enable_ui else ""
    docs = f", docs at {url}/" if config.enable_docs else ""
    return f"{chat}API at {url}/v1{docs}"


class _Server(uvicorn.Server):
    """uvicorn's, which prints `ready` once it takes requests."""

    def __init__(self, config: ServerConfig, backend: Backend, store: RecordStore, ready: str) -> None:
        @contextlib.asynccontextmanager
        async def opened(config: ServerConfig) -> AsyncIterator[Backend]:
            yield backend

        @contextlib.asynccontextmanager
        async def opened_store(where: str) -> AsyncIterator[RecordStore]:
            yield store

        app = create_app(config, open_backend=opened, open_store=opened_store)
        super().__init__(_uvicorn_config(app, config))
        self._ready = ready
        self._is_logged = config.engine.log_format == JSON  # what else is a line of text on stderr
        self._readiness: Readiness = app.state.readiness
        self._reloads: set[asyncio.Task[None]] = set()
        if config.api_key_files:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload_keys, app.state.keys)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            spare_loaded_objects()
            print(self._ready, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets running requests finish, the second one does not. Neither is an error: the exit code is 0."""
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        self._readiness.drain()
        num_requests = len(self.server_state.tasks)
        if num_requests:
            limit_s = self.config.timeout_graceful_shutdown
            message = f"Stopping: {num_requests} running requests have {limit_s} s to finish; a second signal ends them"
            if self._is_logged:
                logger.warning(message)
            else:
                print(message, file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Whoever has connected by now is heard: uvicorn's own end closes connections whose request is not read yet."""
        loop = asyncio.get_running_loop()
        waiting = [connection for listener in sockets or [] for connection in _accepted(listener)]
        for server in self.servers:
            server.close()
        ssl = self.config.ssl
        taken = [asyncio.create_task(loop.connect_accepted_socket(self._protocol, connection, ssl=ssl)) for connection in waiting]
        await asyncio.sleep(_HEARING_S)
        for task in taken:
            task.cancel()  # where a handshake is not over
        await asyncio.gather(*taken, return_exceptions=True)
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        kind = self.config.http_protocol_class
        return kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)  # type: ignore[call-arg]

    def _reload_keys(self, keys: KeyRing) -> None:
        task = asyncio.create_task(keys.reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)


def _accepted(listener: socket.socket) -> Iterator[socket.socket]:
    """The connections in the kernel's queue, which it would reset when the listener is closed."""
    listener.setblocking(False)
    with contextlib.suppress(OSError):  # BlockingIOError: no more are there
        while True:
            connection, _ = listener.accept()
            connection.setblocking(False)
            yield connection


def _uvicorn_config(app: FastAPI, server: ServerConfig) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http=limited_protocol(server.connections),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(server.drain_timeout_s),
    )
    tls = server.tls
    if tls is not None:
        config.ssl_certfile, config.ssl_keyfile, config.ssl_keyfile_password = tls.certfile, tls.keyfile, tls.password
    config.load()
    if config.ssl is not None:
        config.ssl.minimum_version = OLDEST_VERSION
    return config


class ProgressLine:
    """One line on stderr: redrawn on a terminal, a line per quarter elsewhere. is_logged: as lines of the log, which has its own form."""

    def __init__(self, text: str, *, is_logged: bool = False) -> None:
        self._text = text
        self._last = -1.0
        self._is_logged = is_logged
        self._is_terminal = sys.stderr.isatty() and not is_logged

    def show(self, fraction: float) -> None:
        """`fraction` of the weights is loaded, 0 to 1."""
        step = 0.01 if self._is_terminal else 0.25
        if fraction < 1 and fraction - self._last < step:
            return
        self._last = fraction
        if self._is_logged:
            logger.info("%s: %.0f %%", self._text, 100 * fraction)
            return
        bar = ("#" * round(20 * fraction)).ljust(20, ".")
        line = f"{self._text} [{bar}] {fraction:4.0%}"
        self._write(f"\r{line}" if self._is_terminal else f"{line}\n")

    def close(self) -> None:
        if self._is_terminal and self._last >= 0:
            self._write("\n")
        self._last = -1.0

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal, or whoever reads the pipe, may be gone
            print(text, end="", file=sys.stderr, flush=True)


def _listener(config: ServerConfig) -> socket.socket:
    """Bound before the weights are loaded, so that a taken port is known at once."""
    try:
        address = socket.getaddrinfo(config.server_name or None, config.server_port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(address[0], socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio turns Nagle off for TCP by name alone
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _end_unread_connections(listener, config.connections.send_s)
        listener.bind(address[4])
    except OSError as error:
        raise ServingError(f"cannot listen on {config.server_name}:{config.server_port}: {error.strerror or error}") from error
    return listener


def _end_unread_connections(listener: socket.socket, limit_s: float) -> None:
    """Has the kernel end connections whose client takes nothing, also after we closed them; accepted sockets inherit it (Linux)."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(limit_s * 1000))


def _url(listener: socket.socket, scheme: str) -> str:
    host, port = listener.getsockname()[:2]
    shown = "127.0.0.1" if host in _ANYWHERE else f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}:{port}"


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvicorn's choice: uvloop where there is one."""
    return uvicorn.Config("", log_config=None).get_loop_factory()
