"""Kills the engine, workers and Redis at random under load: `python -m tests.robustness.chaos --seconds 300`.

Every request gets its true answer (greedy, so the one that it gets undisturbed) or a clear error, and soon after each kill a new request
succeeds. A `redis-server` on the PATH is killed and started again over its own file; without one, the connection to a fake is cut and
mended. Prints what happened as JSON; ends with 1 where one of these is not so.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
import psutil

from tests.end_to_end.pictures import drawn
from tests.redis_relay import relay
from tests.redis_server import redis_server
from tests.server_process import ServerProcess, data_url, server_process

FLAGS = ("--processed-cache-bytes", "0", "--log-level", "ERROR")
NUM_ASKING = 6
RECOVERED_WITHIN_S = 20.0
PAUSE_S = (6.0, 14.0)  # between two kills
GONE_S = (0.5, 4.0)  # for which Redis stays away
LIMIT_S = 120.0  # for one answer
_PICTURE_PROMPT = "Describe the image please"

# What a client may be told of a kill: codes that say what is wrong, with statuses that say that it may pass.
CLEAR = {
    "engine_unavailable": 503,
    "session_store_unavailable": 503,
    "template_unavailable": 503,
    "vision_not_ready": 503,
    "image_decode_failed": 503,
    "image_preprocess_failed": 503,
    "session_busy": 409,  # of a turn that was ended by its store, until its lease ends
}


class RefusedError(Exception):
    """The server's own error, whole or as a stream's last event."""

    def __init__(self, status: int, code: str, has_retry_after: bool) -> None:
        super().__init__(f"{status} {code}")
        self.is_clear = status == CLEAR.get(code) and has_retry_after


@dataclass
class Report:
    num_true: Counter[str] = field(default_factory=Counter)  # by the kind of request
    clear_errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # another answer, an unclear error, or none
    num_kills: Counter[str] = field(default_factory=Counter)
    slowest_recovery_s: dict[str, float] = field(default_factory=dict)
    num_restarts: int = 0

    @property
    def is_good(self) -> bool:
        is_recovered = all(seconds <= RECOVERED_WITHIN_S for seconds in self.slowest_recovery_s.values())
        return not self.wrong and is_recovered and sum(self.num_true.values()) > 0


Ask = Callable[[aiohttp.ClientSession, int], Awaitable[str]]


def _chat(number: int, *, has_picture: bool) -> dict[str, Any]:
    text = _PICTURE_PROMPT if has_picture else f"Write one sentence about the number {number}."
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if has_picture:
        content.insert(0, {"type": "image_url", "image_url": {"url": data_url(drawn(number))}})
    return {"model": "vlm-demo", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 24}


async def _whole(session: aiohttp.ClientSession, number: int, *, has_picture: bool) -> str:
    answer = await _posted(session, "/v1/chat/completions", _chat(number, has_picture=has_picture))
    return str(answer["choices"][0]["message"]["content"])


async def _streamed(session: aiohttp.ClientSession, number: int, *, has_picture: bool) -> str:
    """Raises EOFError where a stream ends without its end mark."""
    body = {**_chat(number, has_picture=has_picture), "stream": True}
    text = ""
    async with session.post("/v1/chat/completions", json=body) as response:
        await _raise_refusal(response)
        async for line in response.content:
            data = line.removeprefix(b"data: ").strip()
            if data == b"[DONE]":
                return text
            if data.startswith(b"{"):
                chunk = json.loads(data)
                if "error" in chunk:
                    raise RefusedError(chunk["code"], chunk["error"]["code"], has_retry_after=True)
                text += chunk["choices"][0]["delta"].get("content") or ""
    raise EOFError("the stream ended without an end mark")


_session_numbers = itertools.count(1)


async def _conversation(session: aiohttp.ClientSession, number: int) -> str:
    """Two turns about a picture, the second of which needs what was kept of the first."""
    fields = {"session_id": next(_session_numbers), "interactive_mode": True, "temperature": 0, "request_output_len": 16}
    picture = data_url(drawn(number))
    first = await _posted(session, "/v1/chat/interactive", {**fields, "prompt": _PICTURE_PROMPT, "image_url": picture})
    second = await _posted(session, "/v1/chat/interactive", {**fields, "prompt": "Which colour has the shape?"})
    if "abort" in (first["finish_reason"], second["finish_reason"]):
        raise RefusedError(409, "session_busy", has_retry_after=True)  # it lost its lease, and says so
    return f"{first['text']} / {second['text']} / {second['history_tokens']}"


async def _kept_response(session: aiohttp.ClientSession, number: int) -> str:
    body = {"model": "vlm-demo", "input": f"Write one sentence about the number {number}.", "temperature": 0, "max_output_tokens": 24}
    answer = await _posted(session, "/v1/responses", body)
    async with session.get(f"/v1/responses/{answer['id']}") as response:
        await _raise_refusal(response)
        kept = await response.json()
    return str(kept["output"][0]["content"][0]["text"])


async def _posted(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with session.post(path, json=body) as response:
        await _raise_refusal(response)
        return dict(await response.json(content_type=None))


async def _raise_refusal(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        answer = await response.json()
        raise RefusedError(response.status, answer["error"]["code"], "Retry-After" in response.headers)


KINDS: dict[str, Ask] = {
    "text": lambda session, number: _whole(session, number, has_picture=False),
    "text stream": lambda session, number: _streamed(session, number, has_picture=False),
    "picture": lambda session, number: _whole(session, number, has_picture=True),
    "picture stream": lambda session, number: _streamed(session, number, has_picture=True),
    "conversation": _conversation,
    "kept response": _kept_response,
}
NUM_VARIANTS = 3


class Redis(Protocol):
    url: str

    def kill(self) -> None: ...

    def start(self) -> None: ...


class RealRedis:
    """A process that writes everything to its file before it answers."""

    def __init__(self, program: str, folder: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", "", "--loglevel", "warning"]
        self._command += ["--appendonly", "yes", "--appendfsync", "always"]
        self._port = port
        self.url = f"redis://127.0.0.1:{port}/0"
        self.start()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), timeout=1):
                return
            time.sleep(0.05)
        raise AssertionError("redis-server does not listen")


class FakeRedis:
    """The way to a fake, which keeps what it has."""

    def __init__(self, between: Any) -> None:
        self.url = between.url
        self.kill, self.start = between.cut, between.mend


@contextlib.contextmanager
def redis() -> Iterator[Redis]:
    program = shutil.which("redis-server")
    if program is None:
        with redis_server() as url, relay(url) as between:
            yield FakeRedis(between)
        return
    with tempfile.TemporaryDirectory() as folder:
        process = RealRedis(program, folder)
        try:
            yield process
        finally:
            process.kill()


async def chaos(server: ServerProcess, store: Redis, *, seconds: float, seed: int) -> Report:
    """Load and kills for so long; then every kind of request once more."""
    report = Report()
    timeout = aiohttp.ClientTimeout(total=LIMIT_S)
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with aiohttp.ClientSession(server.url, timeout=timeout, connector=connector) as session:
        cases = [(kind, number) for kind in KINDS for number in range(NUM_VARIANTS)]
        expected = {case: await KINDS[case[0]](session, case[1]) for case in cases}
        until_s = time.monotonic() + seconds
        asking = [_asking(session, expected, report, until_s, random.Random(f"{seed} {place}")) for place in range(NUM_ASKING)]
        await asyncio.gather(_killing(server, store, session, expected, report, until_s, random.Random(seed)), *asking)
        for case in cases:
            await _ask(session, case, expected[case], report)
    report.num_restarts = int(server.metric("vlm:engine_restarts_total"))
    return report


Case = tuple[str, int]


async def _asking(session: aiohttp.ClientSession, expected: dict[Case, str], report: Report, until_s: float, draw: random.Random) -> None:
    while time.monotonic() < until_s:
        case = draw.choice(list(expected))
        if not await _ask(session, case, expected[case], report):
            await asyncio.sleep(0.2)  # as a client that heeds Retry-After, but less patient


async def _ask(session: aiohttp.ClientSession, case: Case, expected: str, report: Report) -> bool:
    """Whether it was answered, and truly."""
    kind, number = case
    try:
        answer = await KINDS[kind](session, number)
    except RefusedError as refusal:
        if refusal.is_clear:
            report.clear_errors[str(refusal)] += 1
        else:
            report.wrong.append(f"{kind}: {refusal}")
        return False
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, EOFError) as error:
        report.wrong.append(f"{kind}: {error!r}")
        return False
    if answer != expected:
        report.wrong.append(f"{kind}: {answer!r} in place of {expected!r}")
        return False
    report.num_true[kind] += 1
    return True


async def _killing(
    server: ServerProcess,
    store: Redis,
    session: aiohttp.ClientSession,
    expected: dict[Case, str],
    report: Report,
    until_s: float,
    draw: random.Random,
) -> None:
    """One victim after the other, each in its turn so that a short run has all of them, at random moments."""
    for victim in itertools.cycle(_VICTIMS):
        await asyncio.sleep(draw.uniform(*PAUSE_S))
        if time.monotonic() > until_s and len(report.num_kills) == len(_VICTIMS):
            return
        await (_away(store, draw) if victim == "redis" else _killed(server, victim))
        report.num_kills[victim] += 1
        started_s = time.monotonic()
        kind = _VICTIMS[victim]
        while not await _ask(session, (kind, 0), expected[kind, 0], report):
            if time.monotonic() > started_s + 2 * RECOVERED_WITHIN_S:
                break
            await asyncio.sleep(0.1)
        seconds = round(time.monotonic() - started_s, 1)
        report.slowest_recovery_s[victim] = max(seconds, report.slowest_recovery_s.get(victim, 0.0))


# Module of the process, and the kind of request that needs it.
_VICTIMS = {
    "engine.process": "text",
    "vision.decode": "picture",
    "redis": "conversation",
    "vision.preprocess": "picture stream",
    "vlm_server.jinja_worker": "text stream",
}


async def _away(store: Redis, draw: random.Random) -> None:
    await asyncio.to_thread(store.kill)
    await asyncio.sleep(draw.uniform(*GONE_S))
    await asyncio.to_thread(store.start)


async def _killed(server: ServerProcess, module: str) -> None:
    """One that is there; one that is just being started is waited for."""
    async for process in _processes(server, module):
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
            return


async def _processes(server: ServerProcess, module: str) -> AsyncIterator[psutil.Process]:
    while True:
        for child in psutil.Process(server.process.pid).children():
            with contextlib.suppress(psutil.Error):
                if module in child.cmdline():
                    yield child
        await asyncio.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    with redis() as store, server_process(None, "--session-store", store.url, *FLAGS) as server:
        report = asyncio.run(chaos(server, store, seconds=wanted.seconds, seed=wanted.seed))
    print(json.dumps({**vars(report), "is_good": report.is_good}, indent=1))
    return not report.is_good


if __name__ == "__main__":
    sys.exit(main())
