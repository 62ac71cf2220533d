"""200 hostile picture servers and clients that stop reading, beside an ordinary chat: `python -m tests.robustness.hostile_servers`.

Every request ends within its limit and with its code, every connection that is not read is cut, and the chat takes at most 1.2 times as
long as without them: measured in turns, with and without. Prints a table; ends with 1 where one of these is not so. `--quick` leaves the
time of the chat out of the verdict: on a machine that does other things it says nothing.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import aiohttp
import psutil

from tests.robustness.hostile_origins import ORIGINS
from tests.server_process import ServerProcess, server_process
from vision.config import VisionConfig

MAX_DELAY = 1.2
FETCH_LIMIT_S = VisionConfig().fetch_timeout_s + 10.0  # what is waited for besides the fetch: a place, a worker
SEND_TIMEOUT_S = 10.0
_QUESTION = [{"role": "user", "content": "Tell me a story about a river and a bridge."}]
_BUSY = (429, 503)  # a refusal that says when to come again is an answer, too


@dataclass
class Report:
    """How each request ended, and how long the chats took, in seconds."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # kind, code
    longest_s: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    num_unread: int = 0
    quiet_s: list[float] = field(default_factory=list)
    beside_s: list[float] = field(default_factory=list)

    @property
    def delay(self) -> float:
        return statistics.median(self.beside_s) / statistics.median(self.quiet_s)

    def note(self, kind: str, code: str, duration_s: float) -> None:
        self.outcomes[kind, code] += 1
        self.longest_s[kind] = max(duration_s, self.longest_s.get(kind, 0.0))

    def lines(self) -> list[str]:
        shown = [f"{'server':24} {'ended with':24} {'times':>6} {'longest s':>10}"]
        for (kind, code), count in sorted(self.outcomes.items()):
            shown.append(f"{kind:24} {code or 'an answer':24} {count:6d} {self.longest_s[kind]:10.1f}")
        shown.append(
            f"{self.num_unread} connections that were not read, all of them cut" if self.num_unread else "no connection was left unread"
        )
        quiet_s, beside_s = statistics.median(self.quiet_s), statistics.median(self.beside_s)
        shown.append(f"a chat: {quiet_s:.2f} s alone, {beside_s:.2f} s beside them: {self.delay:.2f} times (at most {MAX_DELAY})")
        return shown + [f"NOT AS IT SHOULD BE: {text}" for text in self.wrong[:20]]


async def attack(server: ServerProcess, origins: list[str], *, num_requests: int, rounds: int, chats: int) -> Report:
    """Each round: `chats` alone, then as many beside `num_requests` hostile ones, a quarter of which are clients that do not read."""
    report = Report()
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    timeout = aiohttp.ClientTimeout(total=10 * FETCH_LIMIT_S)
    async with aiohttp.ClientSession(server.url, connector=connector, timeout=timeout) as session:
        await _chat(session)
        for number in range(rounds):
            report.quiet_s += [await _chat(session) for _ in range(chats)]
            unread = [await _unread(server) for _ in range(num_requests // 4)]
            names = list(itertools.islice(itertools.cycle(_hostile()), num_requests - len(unread)))
            places = itertools.cycle(origins)
            urls = [f"{next(places)}/{name}?{number}.{index}" for index, name in enumerate(names)]
            asked = [asyncio.create_task(_ask(session, name, url, report)) for name, url in zip(names, urls, strict=True)]
            report.beside_s += [await _chat(session) for _ in range(chats)]
            await asyncio.gather(*asked)
            await _check_cut(server, unread, report)
    return report


def _hostile() -> list[str]:
    return [name for name, origin in ORIGINS.items() if "" not in origin.codes]


async def _ask(session: aiohttp.ClientSession, name: str, url: str, report: Report) -> None:
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    body = {"model": "vlm-demo", "messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    started_s = time.monotonic()
    async with session.post("/v1/chat/completions", json=body) as response:
        answer = await response.json()
        duration_s = time.monotonic() - started_s
        code = str(answer.get("error", {}).get("code", ""))
        report.note(name, code, duration_s)
        is_busy = response.status in _BUSY and "Retry-After" in response.headers
        if not is_busy and code not in ORIGINS[name].codes:
            report.wrong.append(f"{name}: {response.status} {code}, not {' or '.join(ORIGINS[name].codes)}")
        if duration_s > FETCH_LIMIT_S:
            report.wrong.append(f"{name}: took {duration_s:.0f} s, more than {FETCH_LIMIT_S:g}")


async def _chat(session: aiohttp.ClientSession) -> float:
    """Seconds of an ordinary greedy stream."""
    body = {"model": "vlm-demo", "messages": _QUESTION, "temperature": 0, "ignore_eos": True, "max_tokens": 48, "stream": True}
    started_s = time.monotonic()
    num_chunks = 0
    async with session.post("/v1/chat/completions", json=body) as response:
        async for line in response.content:
            num_chunks += line.startswith(b"data: {")
    assert num_chunks > 8, f"the chat ended with {response.status} after {num_chunks} chunks"
    return time.monotonic() - started_s


async def _unread(server: ServerProcess) -> asyncio.StreamWriter:
    """A connection whose client asks for a large file again and again, and takes nothing of it."""
    host, port = server.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1024)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(b"GET /swagger-ui/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n" * 16)
    await writer.drain()
    return writer


async def _check_cut(server: ServerProcess, unread: list[asyncio.StreamWriter], report: Report) -> None:
    """The server's end of each is gone within the time for sending, and some for what the kernel holds."""
    own_ports = {writer.get_extra_info("sockname")[1] for writer in unread}
    deadline_s = time.monotonic() + 2 * SEND_TIMEOUT_S + 10
    while left := own_ports & await asyncio.to_thread(_peer_ports, server):
        if time.monotonic() > deadline_s:
            report.wrong.append(f"{len(left)} connections that nobody reads are still open")
            break
        await asyncio.sleep(0.5)
    report.num_unread += len(unread)
    for writer in unread:
        writer.transport.abort()


def _peer_ports(server: ServerProcess) -> set[int]:
    connections = psutil.Process(server.process.pid).net_connections("tcp")
    return {connection.raddr.port for connection in connections if connection.raddr}


@contextlib.contextmanager
def origin_process() -> Iterator[list[str]]:
    """The hostile servers in a process of their own: what they take of a processor's time is then not the measuring client's."""
    command = [sys.executable, "-m", "tests.robustness.hostile_origins"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()
    finally:
        process.kill()
        process.communicate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chats", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    wanted = parser.parse_args()
    flags = ("--allow-private-media", "127.0.0.0/8", "--send-timeout-s", f"{SEND_TIMEOUT_S:g}", "--log-level", "WARNING")
    with origin_process() as origins, server_process(None, *flags) as server:
        report = asyncio.run(attack(server, origins, num_requests=wanted.requests, rounds=wanted.rounds, chats=wanted.chats))
    print("\n".join(report.lines()))
    print(json.dumps({"delay": round(report.delay, 3), "num_wrong": len(report.wrong)}))
    return bool(report.wrong) or (not wanted.quick and report.delay > MAX_DELAY)


if __name__ == "__main__":
    sys.exit(main())
