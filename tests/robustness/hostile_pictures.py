"""A flood of hostile pictures against a server, beside ordinary streams: `python -m tests.robustness.hostile_pictures --pictures 20000`.

Every picture is answered with 200 or 4xx, no worker passes its memory limit, and the streams write what they write undisturbed. Prints
what happened as JSON; ends with 1 where one of these is not so.
"""

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil

from tests.robustness.mutated_pictures import Named, bombs, mutated
from tests.server_process import ServerProcess, data_url, server_process
from vision.config import VisionConfig

NUM_STREAMS = 4
NUM_SENDERS = 8
LIMIT_S = 60.0  # for one answer
_QUESTION = [{"role": "user", "content": "Tell me a story about a river and a bridge."}]
_STORY_TOKENS = 200


@dataclass
class Report:
    """What happened to the pictures, the workers and the streams."""

    num_sent: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    not_answered: list[str] = field(default_factory=list)  # pictures that got 5xx, nothing, or no answer in time
    num_stories: int = 0
    num_other_stories: int = 0
    peak_bytes: int = 0  # the most that a worker held
    peak_limit_bytes: int = 0
    num_replaced: int = 0  # workers that were ended by their limits, and started anew
    duration_s: float = 0.0

    @property
    def is_good(self) -> bool:
        return not self.not_answered and not self.num_other_stories and self.num_stories > 0 and self.peak_bytes <= self.peak_limit_bytes


async def flood(server: ServerProcess, *, num_pictures: int, seed: int) -> Report:
    """Sends all bombs and `num_pictures` damaged pictures."""
    report = Report()
    timeout = aiohttp.ClientTimeout(total=LIMIT_S)
    started_s = time.monotonic()
    connector = aiohttp.TCPConnector(force_close=True)  # no connection is used again, so none can be closed just then
    async with aiohttp.ClientSession(server.url, timeout=timeout, connector=connector) as session:
        expected = await _story(session)
        report.peak_limit_bytes = _peak_limit(server)
        queue = itertools.chain(bombs().items(), itertools.islice(mutated(seed), num_pictures))
        is_over = asyncio.Event()
        beside = [asyncio.create_task(_stories(session, expected, report, is_over)) for _ in range(NUM_STREAMS)]
        beside.append(asyncio.create_task(_watch(server, report, is_over)))
        await asyncio.gather(*(_send(session, queue, report) for _ in range(NUM_SENDERS)))
        is_over.set()
        await asyncio.gather(*beside)
    report.duration_s = round(time.monotonic() - started_s, 1)
    return report


async def _send(session: aiohttp.ClientSession, queue: "itertools.chain[Named]", report: Report) -> None:
    for name, data in queue:
        report.num_sent += 1
        try:
            status, code = await _ask(session, data)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            report.not_answered.append(f"{name}: {error!r}")
            continue
        report.statuses[status] += 1
        report.codes[code] += 1
        if status != 200 and not 400 <= status < 500:
            report.not_answered.append(f"{name}: {status} {code}")


async def _ask(session: aiohttp.ClientSession, data: bytes) -> tuple[int, str]:
    parts = [{"type": "image_url", "image_url": {"url": data_url(data)}}]
    body = {"model": "vlm-demo", "messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    async with session.post("/v1/chat/completions", json=body) as response:
        answer = await response.json()
        return response.status, "" if response.status == 200 else str(answer["error"]["code"])


async def _stories(session: aiohttp.ClientSession, expected: str, report: Report, is_over: asyncio.Event) -> None:
    while not is_over.is_set():
        report.num_stories += 1
        report.num_other_stories += (await _story(session)) != expected


async def _story(session: aiohttp.ClientSession) -> str:
    """An ordinary greedy stream, whole."""
    body: dict[str, Any] = {"model": "vlm-demo", "messages": _QUESTION, "temperature": 0, "ignore_eos": True, "stream": True}
    text = ""
    limit = aiohttp.ClientTimeout(total=20 * LIMIT_S)
    async with session.post("/v1/chat/completions", json={**body, "max_tokens": _STORY_TOKENS}, timeout=limit) as response:
        async for line in response.content:
            data = line.removeprefix(b"data: ").strip()
            if data and data != b"[DONE]":
                text += json.loads(data)["choices"][0]["delta"].get("content") or ""
    return text


def _decode_workers(server: ServerProcess) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if "vision.decode" in _command(child)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _peak_limit(server: ServerProcess) -> int:
    """What an idle worker holds, and its limit beyond that."""
    return max(worker.memory_info().rss for worker in _decode_workers(server)) + VisionConfig().decode_memory_bytes


async def _watch(server: ServerProcess, report: Report, is_over: asyncio.Event) -> None:
    """The most memory that each worker ever held, as the kernel counts it."""
    seen: set[int] = set()
    while not is_over.is_set():
        for worker in _decode_workers(server):
            seen.add(worker.pid)
            report.peak_bytes = max(report.peak_bytes, _peak_of(worker.pid))
        await asyncio.sleep(0.05)
    report.num_replaced = len(seen) - VisionConfig().num_decode_workers


def _peak_of(process_id: int) -> int:
    try:
        with open(f"/proc/{process_id}/status") as file:
            return next((int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM")), 0)
    except OSError:
        return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    with server_process(None, "--log-level", "WARNING") as server:
        report = asyncio.run(flood(server, num_pictures=wanted.pictures, seed=wanted.seed))
    print(json.dumps({**vars(report), "is_good": report.is_good}, indent=1))
    return not report.is_good


if __name__ == "__main__":
    sys.exit(main())
