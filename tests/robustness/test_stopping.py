"""SIGTERM to a real server under load, sent to all of its processes as service managers do."""

import asyncio
import contextlib
import json
import os
import signal

import psutil
import pytest

from tests.end_to_end.pictures import drawn
from tests.robustness.vanishing_clients import ROUTES, connected, request
from tests.server_process import ServerProcess, data_url, server_process

NUM_CLIENTS = 12
FLAGS = ("--drain-timeout-s", "300", "--log-level", "WARNING")


async def ask(server: ServerProcess, number: int, all_sent: asyncio.Semaphore) -> bytes:
    """The whole answer to a request that is sent before the signal comes."""
    reader, writer = await connected(server)
    with contextlib.closing(writer):
        picture = data_url(drawn(number))
        writer.write(request(ROUTES[number % len(ROUTES)], picture, number, stream=number % 2 == 0, max_tokens=24))
        await writer.drain()
        all_sent.release()
        return await asyncio.wait_for(reader.read(), 300)


def is_whole(answer: bytes) -> bool:
    """The end mark of a stream, or as much as the headers promise."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200") or b'"error":{' in body or b'"type":"error"' in body:
        return False
    lengths = [int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    if lengths:
        return len(body) == lengths[0] and bool(json.loads(body))
    return body.endswith(b"0\r\n\r\n")  # the last chunk; a connection that is cut has none


@pytest.mark.full
async def test_every_request_that_was_sent_before_the_signal_is_answered_and_no_later_one_is_taken() -> None:
    with server_process(None, *FLAGS) as server:
        all_sent = asyncio.Semaphore(0)
        asking = [asyncio.create_task(ask(server, number, all_sent)) for number in range(NUM_CLIENTS)]
        for _ in range(NUM_CLIENTS):
            await all_sent.acquire()

        processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
        for process in processes:
            os.kill(process.pid, signal.SIGTERM)
        answers = await asyncio.gather(*asking)
        returncode = await asyncio.to_thread(server.process.wait, 60)

        assert [answer for answer in answers if not is_whole(answer)] == []
        assert returncode == 0
        with pytest.raises(OSError):
            await connected(server)
        assert not any(process.is_running() for process in processes)
