"""Clients that vanish at random points of an image request: `python -m tests.robustness.vanishing_clients --clients 500`.

Afterwards the server must be as it was: no block referenced and none lost, every gauge, shared memory, file, socket and process at its
figure from before. Prints what happened as JSON; ends with 1 where one of these is not so.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import struct
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import psutil

from tests.end_to_end.pictures import drawn
from tests.server_process import ServerProcess, data_url, server_process
from tests.vision.pictures import png

FLAGS = ("--allow-private-media", "127.0.0.0/8", "--processed-cache-bytes", "0", "--download-cache-bytes", "0", "--log-level", "WARNING")
WITHIN_S = 5.0
NUM_AT_ONCE = 24
STEPS = ("connect", "head", "body", "fetch", "decode", "queue", "stream")  # where clients vanish
ROUTES = ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/chat/interactive")
_LONGEST_STAY_S = 2.0
_LARGE = data_url(png(1400, 1000))  # takes the workers a while

# What stays behind on purpose, or says something else than what is in use.
_OTHER_GAUGES = {
    "vlm:num_free_blocks",
    "vlm:num_cached_blocks",
    "vlm:embedding_cache_bytes",
    "vlm:batch_size",
    "vlm:max_batch_size",
    "vlm:sessions",
}


@dataclass
class Report:
    num_vanished: Counter[str] = field(default_factory=Counter)
    num_answered: int = 0  # before they could vanish
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    blocks: dict[str, float] = field(default_factory=dict)
    gauges_back_s: float = 0.0  # until every gauge was at its figure
    all_back_s: float = 0.0  # until files, memory and processes were too

    @property
    def is_good(self) -> bool:
        is_whole = self.blocks["free"] + self.blocks["cached"] == self.blocks["total"]
        return self.after == self.before and is_whole and self.all_back_s <= WITHIN_S


class Origin:
    """A picture server: `/never` is read and never answered, any other path is a picture of its own."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.url = ""

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator["Origin"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.IncompleteReadError):
            path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
            self.num_asked += 1
            if path.startswith("/never"):
                await reader.read()  # until the server under test closes
                return
            picture = drawn(int(path[1:]) % 512)
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(picture), picture))
            await writer.drain()


def request(route: str, picture: str, number: int, *, stream: bool, max_tokens: int) -> bytes:
    """A whole request, head and body, about one picture."""
    question = "Describe the image please"
    chat = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]}]
    body: dict[str, Any] = {"model": "vlm-demo", "stream": stream, "temperature": 0}
    if route == "/v1/messages":
        kind = {"type": "base64", "media_type": "image/png", "data": picture.partition(",")[2]}
        source = kind if picture.startswith("data:") else {"type": "url", "url": picture}
        content = [{"type": "image", "source": source}, {"type": "text", "text": question}]
        body |= {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}
    elif route == "/v1/responses":
        parts = [{"type": "input_image", "image_url": picture}, {"type": "input_text", "text": question}]
        body |= {"input": [{"role": "user", "content": parts}], "max_output_tokens": max_tokens}
    elif route == "/v1/chat/interactive":
        session = {"session_id": number, "interactive_mode": True}
        body |= {"prompt": question, "image_url": picture, "request_output_len": max_tokens, "ignore_eos": True, **session}
    else:
        body |= {"messages": chat, "max_tokens": max_tokens, "ignore_eos": True}
    data = json.dumps(body).encode()
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\nanthropic-version: 2023-06-01\r\nContent-Type: application/json\r\n"
    return f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


async def vanish(server: ServerProcess, *, num_clients: int, seed: int) -> Report:
    """Sends all clients, and compares before and after."""
    report, draw = Report(), random.Random(seed)
    async with Origin().open() as origin:
        for number, route in enumerate(ROUTES * 2):
            await _stay(server, request(route, f"{origin.url}/{number}", number, stream=number % 2 == 0, max_tokens=4))
        report.before = await asyncio.to_thread(_settled, server)
        clients = iter(range(num_clients))
        seeds = iter([draw.random() for _ in range(num_clients)])
        await asyncio.gather(*(_clients(server, origin, clients, seeds, report) for _ in range(NUM_AT_ONCE)))
        await asyncio.to_thread(_compare, server, report)
    return report


async def _clients(server: ServerProcess, origin: Origin, numbers: Iterator[int], seeds: Iterator[float], report: Report) -> None:
    for number in numbers:
        await _client(server, origin, number, random.Random(next(seeds)), report)


async def _client(server: ServerProcess, origin: Origin, number: int, draw: random.Random, report: Report) -> None:
    step, route = STEPS[number % len(STEPS)], draw.choice(ROUTES)
    picture = {"fetch": f"{origin.url}/never/{number}", "decode": _LARGE}.get(step, f"{origin.url}/{number}")
    data = request(route, picture, number, stream=step == "stream" or draw.random() < 0.5, max_tokens=200)
    head = data.index(b"\r\n\r\n") + 4
    part = {"connect": 0, "head": draw.randrange(1, head), "body": draw.randrange(head, len(data))}.get(step, len(data))
    reader, writer = await connected(server)
    try:
        writer.write(data[:part])
        num_asked = origin.num_asked
        if step == "stream":
            for _ in range(draw.randrange(1, 12)):
                await asyncio.wait_for(reader.readline(), 60)
        elif step == "fetch":
            while origin.num_asked == num_asked:  # noqa: ASYNC110  (somebody's picture is being fetched)
                await asyncio.sleep(0.01)
        elif part == len(data):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(), draw.uniform(0, _LONGEST_STAY_S))
                report.num_answered += 1
        report.num_vanished[step] += 1
    except OSError:
        report.num_vanished[f"{step}, and found it closed"] += 1
    finally:
        _leave(writer, abruptly=draw.random() < 0.5)


async def _stay(server: ServerProcess, data: bytes) -> None:
    """A client that reads its whole answer."""
    reader, writer = await connected(server)
    writer.write(data)
    answer = await asyncio.wait_for(reader.read(), 120)
    assert answer.startswith(b"HTTP/1.1 200"), answer[:1000]
    _leave(writer, abruptly=False)


async def connected(server: ServerProcess) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(server.url)
    return await asyncio.open_connection(address.hostname, address.port)


def _leave(writer: asyncio.StreamWriter, *, abruptly: bool) -> None:
    """With a reset, as a process that is killed, or with an end."""
    if abruptly:
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.close()


def _compare(server: ServerProcess, report: Report) -> None:
    started_s = time.monotonic()
    while not report.all_back_s and time.monotonic() < started_s + 2 * WITHIN_S:
        gauges = _gauges(server)
        if not report.gauges_back_s and gauges.items() <= report.before.items():
            report.gauges_back_s = round(time.monotonic() - started_s, 2)
        report.after = gauges | _resources(server)
        if report.after == report.before:
            report.all_back_s = round(time.monotonic() - started_s, 2)
        time.sleep(0.05)
    report.all_back_s = report.all_back_s or float("inf")
    samples = _samples(server)
    names = {"free": "vlm:num_free_blocks", "cached": "vlm:num_cached_blocks", "total": "vlm:num_blocks"}
    report.blocks = {word: samples[name] for word, name in names.items()}


def _settled(server: ServerProcess) -> dict[str, float]:
    """The figures once they stay as they are."""
    last: dict[str, float] = {}
    for _ in range(50):
        figures = _gauges(server) | _resources(server)
        if figures == last:
            return figures
        last = figures
        time.sleep(0.3)
    raise AssertionError(f"the idle server does not settle: {last}")


def _gauges(server: ServerProcess) -> dict[str, float]:
    """Every gauge that says what is in use now."""
    text = _metrics(server)
    kinds = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE"))
    return {name: value for name, value in _parsed(text).items() if kinds.get(name.split("{")[0]) == "gauge" and not _is_other(name)}


def _is_other(name: str) -> bool:
    return name in _OTHER_GAUGES or name.split("{")[0].endswith("_created")


def _samples(server: ServerProcess) -> dict[str, float]:
    return _parsed(_metrics(server))


def _metrics(server: ServerProcess) -> str:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        text: str = response.read().decode()
    return text


def _parsed(text: str) -> dict[str, float]:
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


def _resources(server: ServerProcess) -> dict[str, float]:
    """Processes by their module, and each one's descriptors by what they are."""
    counts: Counter[str] = Counter()
    main = psutil.Process(server.process.pid)
    for process in (main, *main.children(recursive=True)):
        with contextlib.suppress(psutil.Error, OSError):
            words = process.cmdline()
            module = words[words.index("-m") + 1] if "-m" in words else words[0]
            counts[f"processes of {module}"] += 1
            for descriptor in os.listdir(f"/proc/{process.pid}/fd"):
                with contextlib.suppress(OSError):
                    counts[f"{_kind(os.readlink(f'/proc/{process.pid}/fd/{descriptor}'))} of {module}"] += 1
    return dict(counts)


def _kind(target: str) -> str:
    if target.startswith("/memfd:"):
        return "shared memory"
    return target.split(":")[0] if not target.startswith("/") else "files"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    with server_process(None, *FLAGS) as server:
        report = asyncio.run(vanish(server, num_clients=wanted.clients, seed=wanted.seed))
    print(json.dumps({**vars(report), "is_good": report.is_good}, indent=1))
    return not report.is_good


if __name__ == "__main__":
    sys.exit(main())
