"""A real HTTP server on a free loopback port, in a thread with its own event loop."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from engine.config import EngineConfig
from tests.contract.fake_engine import FakeBackend
from vlm_server.app import create_app
from vlm_server.config import ConnectionLimits, ServerConfig
from vlm_server.connections import limited_protocol

MODEL = "org/tiny-vlm"


@dataclass(frozen=True, slots=True)
class RunningServer:
    """Where it listens, and the doubles behind it, for tests that script the engine."""

    url: str
    model: str
    scripted: FakeBackend | None

    @property
    def is_scripted(self) -> bool:
        return self.scripted is not None

    @property
    def backend(self) -> FakeBackend:
        assert self.scripted is not None, "this test needs the scripted engine"
        return self.scripted


def fake_config(**overrides: object) -> ServerConfig:
    fields = {"engine": EngineConfig(model_folder="/no/such/folder"), "model_name": MODEL, "model_root": "/models/tiny-vlm"}
    fields["session_store"] = "memory"
    return ServerConfig(**{**fields, **overrides})  # type: ignore[arg-type]


@contextlib.contextmanager
def running_server(config: ServerConfig | None = None, *, connections: ConnectionLimits | None = None) -> Iterator[RunningServer]:
    """Serves scripted answers until the block ends. The socket listens before the thread starts, so no client comes too early."""
    backend = FakeBackend()
    with serving(create_app(config or fake_config(), open_backend=backend.open), connections=connections) as url:
        yield RunningServer(url, MODEL, backend)


@contextlib.contextmanager
def serving(app: ASGIApp, *, connections: ConnectionLimits | None = None) -> Iterator[str]:
    """The URL of an app that is being served, with the limits that `vlm-server serve` sets unless others are given."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio turns Nagle off for TCP by name alone
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    protocol = limited_protocol(connections or ConnectionLimits())
    server = uvicorn.Server(uvicorn.Config(app, http=protocol, log_config=None, access_log=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive()
