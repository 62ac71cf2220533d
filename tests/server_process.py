"""The real server as its own process on a free loopback port, for end-to-end tests and benchmarks."""

import base64
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

READY_TIMEOUT_S = 180
POLL_S = 0.1


@dataclass(frozen=True)
class ServerProcess:
    url: str
    process: "subprocess.Popen[bytes]"

    @property
    def engine_id(self) -> int:
        """The process id of the engine that runs now."""
        return next(child.pid for child in psutil.Process(self.process.pid).children() if "engine.process" in child.cmdline())

    def health(self, path: str = "/health") -> int:
        """The status of /health; 0 where nothing answers."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def metric(self, name: str) -> float:
        """One sample of /metrics, by its name and labels as they stand there."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.rsplit(" ", 1)[0] == name)

    def wait_for_health(self, status: int, *, timeout_s: float = READY_TIMEOUT_S, path: str = "/health") -> None:
        deadline = time.monotonic() + timeout_s
        while self.health(path) != status:
            assert self.process.poll() is None, "the server process ended"
            assert time.monotonic() < deadline, f"{path} did not become {status} within {timeout_s} s"
            time.sleep(POLL_S)


@contextlib.contextmanager
def server_process(model: Path | str | None = None, *flags: str, environment: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """A ready server of `model` (None: the embedded one); at the end it is asked to stop, and has to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vlm_server.cli", "serve", *([str(model)] if model else [])]
    command += ["--server-name", "127.0.0.1", "--server-port", str(port), "--session-store", "memory", *flags]
    process = subprocess.Popen(command, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL)
    server = ServerProcess(f"http://127.0.0.1:{port}", process)
    try:
        server.wait_for_health(200)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()
            process.wait()


def data_url(file: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(file).decode()}"
