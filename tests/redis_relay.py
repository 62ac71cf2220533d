"""The network between a server and its Redis, which a test can cut, hold and mend; what Redis holds stays."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit


class Relay:
    """Passes bytes between one loopback port and Redis. `cut`: nothing listens and what is open ends. `hold`: nothing passes on."""

    def __init__(self, redis_url: str) -> None:
        address = urlsplit(redis_url)
        self._target = (address.hostname, address.port)
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._may_pass = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._address = self._listener.getsockname()
        self.url = f"redis://127.0.0.1:{self._address[1]}{address.path}"
        self._begin()

    def cut(self) -> None:
        """As a Redis that was killed."""
        self._may_pass.set()
        for listening in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for each in (self._listener, *self._sockets):
            each.close()
        self._sockets.clear()
        self._threads.clear()

    def hold(self) -> None:
        """As a Redis that hangs."""
        self._may_pass.clear()

    def mend(self) -> None:
        """After `cut` or `hold`."""
        if self._listener.fileno() < 0:
            self._listener = socket.create_server(self._address)
            self._begin()
        self._may_pass.set()

    def _begin(self) -> None:
        self._may_pass.set()
        self._run(self._accept)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                redis = socket.create_connection(self._target)
                self._sockets += [client, redis]
                self._run(self._pump, client, redis)
                self._run(self._pump, redis, client)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._may_pass.wait()
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)

    def _run(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()


@contextlib.contextmanager
def relay(redis_url: str) -> Iterator[Relay]:
    between = Relay(redis_url)
    try:
        yield between
    finally:
        between.cut()
