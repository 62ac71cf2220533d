"""aiohttp's connections, of which few are kept open for a next request. Knows nothing of pictures or of addresses."""

from aiohttp import ClientRequest, ClientTimeout, TCPConnector
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.tracing import Trace

MAX_IDLE_CONNECTIONS = 32  # of all hosts; each is a descriptor that counts for no download any more


class Connector(TCPConnector):
    """Keeps the last MAX_IDLE_CONNECTIONS that were used; others are closed without waiting for the other side, which TLS would do."""

    _idle: tuple[ResponseHandler, ...] = ()  # the longest unused one first

    async def connect(self, req: ClientRequest, traces: list[Trace], timeout: ClientTimeout) -> Connection:
        connection = await super().connect(req, traces, timeout)
        protocol = connection.protocol
        assert protocol is not None, "what connects has one"
        self._idle = tuple(idle for idle in self._idle if idle is not protocol)
        connection.add_callback(lambda: self._keep_or_close(protocol))
        return connection

    def _keep_or_close(self, protocol: ResponseHandler) -> None:
        """Comes before aiohttp's own release, which keeps what is open and may be used again."""
        if protocol.should_close:
            _close(protocol)
            return
        idle = (*(idle for idle in self._idle if idle.is_connected()), protocol)
        for oldest in idle[:-MAX_IDLE_CONNECTIONS]:
            _close(oldest)
        self._idle = idle[-MAX_IDLE_CONNECTIONS:]


def _close(protocol: ResponseHandler) -> None:
    protocol.force_close()
    if protocol.transport is not None:
        protocol.transport.abort()
