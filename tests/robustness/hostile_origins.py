"""Picture servers that do not keep to HTTP, or to their word, or never end: one path each, on loopback.

`python -m tests.robustness.hostile_origins` serves them in a process of its own and prints where. Sends no request.
"""

import asyncio
import contextlib
import gzip
import itertools
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from tests.vision.pictures import png

PICTURE = png(64, 48)
NUM_HOSTS = 16  # of the process: more than one host's share of downloads
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"
_DRIP_S = 0.5

Connection = asyncio.StreamWriter


@dataclass(frozen=True, slots=True)
class Origin:
    """What a server does, and the codes that a request for its picture may end with; "" for a picture that is read."""

    answer: Callable[[Connection], Awaitable[None]]
    codes: frozenset[str]
    is_quick: bool = True  # refused without waiting for a timeout


async def _send(connection: Connection, data: bytes) -> None:
    connection.write(data)
    await connection.drain()


async def _for_ever() -> None:
    await asyncio.Event().wait()


async def _drip(connection: Connection, data: bytes) -> None:
    for byte in data:
        await _send(connection, bytes([byte]))
        await asyncio.sleep(_DRIP_S)
    await _for_ever()


async def drips(connection: Connection) -> None:
    await _send(connection, _HEAD + b"Content-Length: %d\r\n\r\n" % len(PICTURE))
    await _drip(connection, PICTURE)


async def drips_its_head(connection: Connection) -> None:
    await _drip(connection, _HEAD + b"X-Padding: " + b"x" * 1000)


async def never_answers(connection: Connection) -> None:
    await _for_ever()


async def never_goes_on(connection: Connection) -> None:
    await _send(connection, _HEAD + b"Content-Length: 100000\r\n\r\n" + PICTURE[:50])
    await _for_ever()


async def never_ends(connection: Connection) -> None:
    await _send(connection, _HEAD + b"Connection: close\r\n\r\n")
    while True:
        await _send(connection, bytes(1 << 16))


async def never_ends_slowly(connection: Connection) -> None:
    """Fast enough to be no drip."""
    await _send(connection, _HEAD + b"Connection: close\r\n\r\n")
    while True:
        await _send(connection, bytes(2048))
        await asyncio.sleep(_DRIP_S)


async def never_ends_in_chunks(connection: Connection) -> None:
    await _send(connection, _HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        await _send(connection, b"10000\r\n" + bytes(1 << 16) + b"\r\n")


async def claims_more(connection: Connection) -> None:
    await _send(connection, _HEAD + b"Content-Length: %d\r\n\r\n" % (len(PICTURE) + 10) + PICTURE)


async def claims_gigabytes(connection: Connection) -> None:
    await _send(connection, _HEAD + b"Content-Length: 8000000000\r\n\r\n" + PICTURE)
    await _for_ever()


async def claims_less(connection: Connection) -> None:
    await _send(connection, _HEAD + b"Content-Length: 100\r\n\r\n" + PICTURE)


async def claims_nonsense(connection: Connection) -> None:
    await _send(connection, _HEAD + b"Content-Length: -5\r\n\r\n" + PICTURE)


async def claims_nothing(connection: Connection) -> None:
    await _send(connection, _HEAD + b"Connection: close\r\n\r\n" + PICTURE)


async def bad_chunks(connection: Connection) -> None:
    await _send(connection, _HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + PICTURE)


async def huge_chunk(connection: Connection) -> None:
    await _send(connection, _HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 15 + b"\r\n" + PICTURE)
    await _for_ever()


async def half_closed(connection: Connection) -> None:
    await _send(connection, _HEAD + b"Content-Length: %d\r\n\r\n" % len(PICTURE) + PICTURE[:100])
    connection.write_eof()
    await _for_ever()


async def half_closed_at_once(connection: Connection) -> None:
    connection.write_eof()
    await _for_ever()


async def breaks_off(connection: Connection) -> None:
    connection.transport.abort()


async def is_no_http(connection: Connection) -> None:
    await _send(connection, b"\x16\x03\x01" + bytes(range(256)) * 8)


async def endless_head(connection: Connection) -> None:
    await _send(connection, _HEAD)
    for number in itertools.count():
        await _send(connection, b"X-%d: " % number + b"a" * 1000 + b"\r\n")


async def endless_interim(connection: Connection) -> None:
    """Answers of 100 and never the last one."""
    while True:
        await _send(connection, b"HTTP/1.1 100 Continue\r\n\r\n")
        await asyncio.sleep(_DRIP_S)


async def redirects_to_itself(connection: Connection) -> None:
    await _send(connection, b"HTTP/1.1 302 Found\r\nLocation: /redirects_to_itself\r\nContent-Length: 0\r\n\r\n")


async def redirects_nowhere(connection: Connection) -> None:
    await _send(connection, b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n")


async def bomb(connection: Connection) -> None:
    await _send(connection, _HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(_BOMB) + _BOMB)


async def cut_gzip(connection: Connection) -> None:
    data = gzip.compress(PICTURE)[:100]
    await _send(connection, _HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(data) + data)


async def asks_for_patience(connection: Connection) -> None:
    await _send(connection, b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 3600\r\nContent-Length: 0\r\n\r\n")


_BOMB = gzip.compress(bytes(64 << 20))
_FAILED, _LATE, _LARGE = frozenset({"image_fetch_failed"}), frozenset({"image_fetch_timeout"}), frozenset({"image_too_large"})
_DAMAGED = frozenset({"image_decode_failed", "image_fetch_failed"})  # what follows the stated length may come with it

ORIGINS = {
    origin.answer.__name__: origin
    for origin in (
        *(Origin(answer, _LATE, is_quick=False) for answer in (drips, drips_its_head, never_answers, never_goes_on, endless_interim)),
        *(Origin(answer, _LATE, is_quick=False) for answer in (never_ends_slowly, claims_gigabytes, huge_chunk)),
        *(Origin(answer, _LARGE) for answer in (never_ends, never_ends_in_chunks, bomb)),
        *(Origin(answer, _FAILED) for answer in (claims_more, claims_nonsense, bad_chunks, half_closed, half_closed_at_once)),
        *(Origin(answer, _FAILED) for answer in (breaks_off, is_no_http, endless_head, redirects_to_itself, cut_gzip)),
        *(Origin(answer, _FAILED) for answer in (asks_for_patience,)),
        Origin(redirects_nowhere, frozenset({"image_fetch_failed", "url_invalid"})),
        Origin(claims_less, _DAMAGED),
        Origin(claims_nothing, frozenset({""})),
    )
}


@contextlib.asynccontextmanager
async def hostile_origins(num_hosts: int = 1) -> AsyncIterator[list[str]]:
    """Serves them on as many loopback addresses until the block ends; gives the URL of each. A path may be followed by any query."""
    running: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, connection: Connection) -> None:
        task = asyncio.create_task(_answer(reader, connection))
        running.add(task)
        task.add_done_callback(running.discard)
        task.add_done_callback(lambda task: connection.transport.abort())

    server = await asyncio.start_server(accept, [f"127.0.0.{1 + number}" for number in range(num_hosts)], 0)
    try:
        yield ["http://{}:{}".format(*listener.getsockname()) for listener in server.sockets]
    finally:
        server.close()
        await _settled()  # those who were let in last are there
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await _settled()  # the transports close


async def _settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def _answer(reader: asyncio.StreamReader, connection: Connection) -> None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split(b" ", 2)[1].decode().lstrip("/").split("?")[0]
        await ORIGINS[path].answer(connection)
        connection.close()
        await connection.wait_closed()
    except (OSError, asyncio.IncompleteReadError):
        pass  # the other side had enough


async def _serve() -> None:
    async with hostile_origins(NUM_HOSTS) as urls:
        print(*urls, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until who started it ends


if __name__ == "__main__":
    asyncio.run(_serve())
