"""A Redis for tests on a free loopback port, in a thread: what several servers share, without a Redis to be installed.

With the URL of a real one in TEST_REDIS_URL, the same tests run against that.
"""

import contextlib
import os
import threading
from collections.abc import Iterator

from fakeredis import TcpFakeServer


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """Its URL, until the block ends."""
    if url := os.environ.get("TEST_REDIS_URL"):
        yield url
        return
    server = TcpFakeServer(("127.0.0.1", 0))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"redis://127.0.0.1:{server.server_address[1]}/0"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
        assert not thread.is_alive()
