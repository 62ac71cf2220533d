"""Half an hour of mixed load, after which no process may hold more than before: `python -m tests.robustness.soak`.

The caches are small, so that they are full after the first sixth of the time. From then on each process may grow by 2 % + 8 MiB, and over
the last two thirds by less than 1 MiB per 10 minutes. Prints a table of the processes; ends with 1 where one grew by more, or where a
request was not answered as it should be. `--minutes 3` is for trying the script: so short a time shows no trend.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from dataclasses import dataclass, field

import aiohttp

from tests.robustness.memory import MIB, History, sample
from tests.robustness.mixed_load import Load, picture_origin
from tests.server_process import ServerProcess, server_process

MINUTES = 30.0
TREND_MINUTES = 20.0  # a shorter time is too short for a slope
SAMPLE_S = 2.0
MAX_GROWTH = 0.02
MAX_GROWTH_BYTES = 8 * MIB
MAX_SLOPE_BYTES = 1 * MIB  # per 10 minutes
LIMIT_S = 120.0  # for one answer

# The KV cache's pages are touched when they are first used: a large one would look like growth for a long time.
SMALL_CACHES = (
    *("--processed-cache-bytes", "16000000", "--download-cache-bytes", "4000000", "--embedding-cache-bytes", "8000000"),
    *("--session-len", "1024", "--cache-max-entry-count", "96", "--max-sessions", "20", "--max-responses", "20", "--max-files", "20"),
    *("--allow-private-media", "127.0.0.0/8", "--log-level", "WARNING"),
)


@dataclass
class Report:
    """Samples by process, and what went wrong."""

    minutes: float
    histories: dict[str, History] = field(default_factory=dict)
    num_requests: int = 0
    unexpected: list[str] = field(default_factory=list)

    @property
    def full_s(self) -> float:
        return self.minutes * 60 / 6

    @property
    def trend_s(self) -> float:
        return self.minutes * 60 / 3

    @property
    def has_trend(self) -> bool:
        return (self.minutes * 60 - self.trend_s) >= TREND_MINUTES * 60

    @property
    def lasting(self) -> dict[str, History]:
        """Of those that were there when the caches were full, and still are: workers that were ended are replaced by new ones."""
        end_s = max(history.times_s[-1] for history in self.histories.values())
        return {
            name: history
            for name, history in self.histories.items()
            if history.times_s[0] <= self.full_s and history.times_s[-1] > end_s - 3 * SAMPLE_S
        }

    def has_grown(self, history: History) -> bool:
        size, growth = history.growth(since_s=self.full_s, step_s=self._step_s)
        is_steep = self.has_trend and history.slope(since_s=self.trend_s, step_s=self._step_s) >= MAX_SLOPE_BYTES
        return growth > MAX_GROWTH * size + MAX_GROWTH_BYTES or is_steep

    @property
    def is_good(self) -> bool:
        return not self.unexpected and self.num_requests > 0 and not any(map(self.has_grown, self.lasting.values()))

    def lines(self) -> list[str]:
        """A table: what each process held when the caches were full, what came since, and the trend of the last two thirds."""
        shown = [f"{'process':32} {'full MiB':>10} {'grown MiB':>10} {'MiB/10 min':>11}"]
        for name, history in sorted(self.lasting.items()):
            size, growth = history.growth(since_s=self.full_s, step_s=self._step_s)
            slope = history.slope(since_s=self.trend_s, step_s=self._step_s)
            mark = "  GROWS" if self.has_grown(history) else ""
            shown.append(f"{name:32} {size / MIB:10.1f} {growth / MIB:10.2f} {slope / MIB:11.2f}{mark}")
        trend = "" if self.has_trend else "; too short for the trend to count"
        shown.append(f"{self.num_requests} requests in {self.minutes:g} minutes, {len(self.histories) - 1} processes{trend}")
        return shown + [f"NOT AS IT SHOULD BE: {text}" for text in self.unexpected[:20]]

    @property
    def _step_s(self) -> float:
        return max(self.minutes * 60 / 30, 2 * SAMPLE_S)


async def soak(server: ServerProcess, *, minutes: float, seed: int = 0, num_clients: int = 3, pause_s: float = 0.2) -> Report:
    """Sends for `minutes`; each client waits `pause_s` between its requests."""
    report = Report(minutes)
    started_s = time.monotonic()
    timeout = aiohttp.ClientTimeout(total=LIMIT_S)
    connector = aiohttp.TCPConnector(force_close=True)
    async with picture_origin() as origin, aiohttp.ClientSession(server.url, timeout=timeout, connector=connector) as session:
        load = Load(session, origin, seed)

        async def client() -> None:
            while time.monotonic() - started_s < minutes * 60:
                await load.one()
                await asyncio.sleep(pause_s)

        clients = [asyncio.create_task(client()) for _ in range(num_clients)]
        while not all(task.done() for task in clients):
            for name, size in (await asyncio.to_thread(sample, server.process.pid)).items():
                report.histories.setdefault(name, History()).add(time.monotonic() - started_s, size)
            await asyncio.sleep(SAMPLE_S)
        await asyncio.gather(*clients)
    report.num_requests, report.unexpected = load.num_sent, load.unexpected
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=3)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with server_process(None, *SMALL_CACHES, "--session-store", f"{folder}/sessions.sqlite3") as server:
            report = asyncio.run(soak(server, minutes=wanted.minutes, seed=wanted.seed, num_clients=wanted.clients))
    print("\n".join(report.lines()))
    return not report.is_good


if __name__ == "__main__":
    sys.exit(main())
