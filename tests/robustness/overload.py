"""Five times more requests than the server can answer, for two minutes: `python -m tests.robustness.overload`.

They come in floods of half a minute, whether others are answered or not. Each gets one answer: the text that it gets alone, or a 429 or
503 with Retry-After; and as many are answered per second as the capacity says, less 10 %. The capacity is measured before and after each
flood, by half as many clients again as are computed at once, and the mean of both counts, since no machine is equally fast for minutes.
Prints a table; ends with 1 where one of these is not so. `--quick` leaves the rate out of the verdict.

Clients have machines of their own: here they run only where the server leaves a core idle, and write bytes that were made before.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tests.server_process import ServerProcess, data_url, server_process
from tests.vision.pictures import png

FACTOR = 5
ROUNDS = 4
MIN_SHARE = 0.9  # of the capacity
MAX_WAITING = 64
BATCH = 16
LIMIT_S = 300.0
_REFUSALS = (429, 503)
_NUM_QUESTIONS = 16


@dataclass
class Report:
    """What became of the requests. Times in seconds."""

    capacities: list[float] = field(default_factory=list)  # answers per second, before the first flood and after each
    rates: list[float] = field(default_factory=list)  # requests per second, as each flood sent them
    throughputs: list[float] = field(default_factory=list)  # answers per second while they came
    num_sent: int = 0
    num_answered: int = 0
    num_refused: int = 0
    ids: Counter[str] = field(default_factory=Counter)
    refusal_s: list[float] = field(default_factory=list)
    answer_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def shares(self) -> list[float]:
        """Of the capacity, in each flood."""
        capacities = [max(statistics.mean(pair), 1e-9) for pair in itertools.pairwise(self.capacities)]
        return [throughput / capacity for throughput, capacity in zip(self.throughputs, capacities, strict=True)]

    @property
    def is_whole(self) -> bool:
        """Whether each request had one answer, and its own."""
        is_each_once = all(count == 1 for count in self.ids.values()) and len(self.ids) == self.num_answered
        return not self.wrong and is_each_once and self.num_sent == self.num_answered + self.num_refused

    @property
    def keeps_up(self) -> bool:
        return statistics.mean(self.shares) >= MIN_SHARE

    def lines(self) -> list[str]:
        answer_s, refusal_ms = self.answer_s or [0.0], [1000 * seconds for seconds in self.refusal_s or [0.0]]
        return [
            f"capacity   {_row(self.capacities)} answers per second",
            f"sent       {_row(self.rates)} requests per second, {self.num_sent} in all",
            f"answered   {_row(self.throughputs)} per second",
            f"           {statistics.mean(self.shares):.0%} of the capacity ({', '.join(f'{share:.0%}' for share in self.shares)})",
            f"           {self.num_answered} in all, in {statistics.median(answer_s):.1f} s, at most {max(answer_s):.1f} s",
            f"refused    {self.num_refused} in all, in {statistics.median(refusal_ms):.1f} ms, at most {max(refusal_ms):.0f} ms",
            *(f"NOT AS IT SHOULD BE: {text}" for text in self.wrong[:20]),
        ]


class Overload:
    """One run. Every third question is about a picture."""

    def __init__(self, url: str) -> None:
        self.report = Report()
        self._host, self._port = _address(url)
        self._expected: dict[int, str] = {}
        self._requests = [_request(_body(number)) for number in range(_NUM_QUESTIONS)]
        self._first_refusal_s: float | None = None
        self._answered_s: list[float] = []

    async def learn(self) -> None:
        """What each question is answered with when nothing else runs: greedy answers are the same under load."""
        for number in range(_NUM_QUESTIONS):
            _, answer, _ = await self._ask(number)
            self._expected[number] = _text(answer)

    async def measure(self, seconds: float) -> None:
        """The capacity: clients that ask again as soon as they have an answer."""
        num_answered, until_s = 0, time.monotonic() + seconds

        async def client(number: int) -> None:
            nonlocal num_answered
            while time.monotonic() < until_s:
                number += 1
                status, answer, _ = await self._ask(number % _NUM_QUESTIONS)
                num_answered += time.monotonic() <= until_s
                self._check(number % _NUM_QUESTIONS, status, answer)

        await asyncio.gather(*(client(number) for number in range(BATCH + BATCH // 2)))
        self.report.capacities.append(num_answered / seconds)

    async def flood(self, seconds: float) -> None:
        """Sends at `FACTOR` times the last capacity. The throughput is that from the first refusal on, when the queue is full."""
        report, started_s, rate = self.report, time.monotonic(), FACTOR * self.report.capacities[-1]
        self._first_refusal_s = None
        tasks: list[asyncio.Task[None]] = []
        while (elapsed_s := time.monotonic() - started_s) < seconds:
            while len(tasks) < elapsed_s * rate:
                tasks.append(asyncio.create_task(self._one(len(tasks) % _NUM_QUESTIONS)))
            await asyncio.sleep(0.005)
        full_s = self._first_refusal_s or started_s
        report.throughputs.append(sum(moment >= full_s for moment in self._answered_s) / (time.monotonic() - full_s))
        report.rates.append(len(tasks) / seconds)
        report.num_sent += len(tasks)
        await asyncio.gather(*tasks)

    async def _one(self, number: int) -> None:
        report, started_s = self.report, time.monotonic()
        try:
            status, answer, headers = await self._ask(number)
        except (OSError, TimeoutError, ValueError) as error:
            report.wrong.append(f"lost: {error!r}")
            return
        duration_s = time.monotonic() - started_s
        if status in _REFUSALS:
            self._first_refusal_s = self._first_refusal_s or time.monotonic()
            report.num_refused += 1
            report.refusal_s.append(duration_s)
            if not headers.get("retry-after", "").isdigit():
                report.wrong.append(f"{status} without Retry-After: {answer}")
            return
        self._answered_s.append(time.monotonic())
        report.num_answered += 1
        report.answer_s.append(duration_s)
        report.ids[str(answer.get("id"))] += 1
        self._check(number, status, answer)

    def _check(self, number: int, status: int, answer: dict[str, Any]) -> None:
        if status != 200 or _text(answer) != self._expected[number]:
            self.report.wrong.append(f"question {number}: {status} {json.dumps(answer)[:200]}")

    async def _ask(self, number: int) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Status, answer and headers, by a connection of its own. Raises OSError, TimeoutError, ValueError."""
        async with asyncio.timeout(LIMIT_S):
            reader, writer = await asyncio.open_connection(self._host, self._port)
            try:
                writer.write(self._requests[number])
                head, body = (await reader.read()).split(b"\r\n\r\n", 1)
            finally:
                writer.close()
        status, *lines = head.decode().split("\r\n")
        return int(status.split()[1]), json.loads(body), dict(line.split(": ", 1) for line in lines)


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    return parts.hostname, int(parts.port or 80)


def _request(body: bytes) -> bytes:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + body


def _body(number: int) -> bytes:
    text = {"type": "text", "text": f"Count up to {number + 3}, please."}
    image = {"type": "image_url", "image_url": {"url": data_url(png(256, 192, seed=number))}}
    messages = [{"role": "user", "content": [image, text] if number % 3 == 0 else [text]}]
    return json.dumps({"model": "vlm-demo", "messages": messages, "max_tokens": 12, "temperature": 0, "ignore_eos": True}).encode()


def _text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"]) if "choices" in answer else ""


def _row(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:.2f}" for number in numbers)


async def overload(server: ServerProcess, *, measure_s: float, flood_s: float, rounds: int = ROUNDS) -> Report:
    """flood_s: of all rounds together."""
    run = Overload(server.url)
    await run.learn()
    await run.measure(measure_s)
    for _ in range(rounds):
        await run.flood(flood_s / rounds)
        await run.measure(measure_s)
    return run.report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--measure-seconds", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="floods in which the seconds come; 1: without a pause")
    parser.add_argument("--quick", action="store_true")
    wanted = parser.parse_args()
    flags = ("--max-waiting", str(MAX_WAITING), "--max-batch-size", str(BATCH), "--log-level", "WARNING")
    with server_process(None, *flags) as server:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        report = asyncio.run(overload(server, measure_s=wanted.measure_seconds, flood_s=wanted.seconds, rounds=wanted.rounds))
    print("\n".join(report.lines()))
    return not (report.is_whole and (report.keeps_up or wanted.quick))


if __name__ == "__main__":
    sys.exit(main())
