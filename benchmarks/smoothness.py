"""Do text streams keep flowing while pictures are encoded? A SmolVLM-256M-shaped model, 8 text streams, pictures beside them.

    python -m benchmarks.smoothness            (alone on the machine: other load ruins timings)

Finds the highest rate of pictures that is sustained beside the streams, then looks at the streams at 80 % of it; the same at the same rate
with the encoder inside the decode loop, as a server without slices has it. Then 64 requests with pictures at once, and how late the
server's event loop ran meanwhile. Exits with 1 where a mark is missed.
"""

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.load import ask, image_body, percentile, stream_times, text_body
from benchmarks.smolvlm_shape import write_smolvlm_shape
from tests.server_process import ServerProcess, server_process

NUM_STREAMS = 8
STREAM_TOKENS = 1000  # of one text answer, then the next begins; an answer's first token is no gap
STREAM_WORDS = 64  # of its prompt
PICTURE_TOKENS = 8  # of an answer about a picture
CLOSED_LOOP = 8  # pictures at once where the rate is looked for
LADDER = (1.15, 1.1, 1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)  # of the rate at which waiting pictures went through
MAX_WAIT_S = 10.0
WARM_UP_S = 10.0
NUM_AT_ONCE = 64  # pictures, for the event loop
MAX_LAG_S = 0.02
LAG = "vlm:event_loop_lag_seconds"
INSIDE = ("--encoder-share", "0.999")  # a picture begun is encoded to its end before the next step


@dataclass(slots=True)
class Streams:
    """Endless text streams and when each of their tokens came, in seconds of the process's clock."""

    times_s: list[list[float]] = field(default_factory=list)  # one list per answer

    def gaps_s(self, start_s: float, end_s: float) -> list[float]:
        """Between two tokens of one answer, the later of them within the window."""
        return [b - a for times in self.times_s for a, b in pairwise(times) if start_s <= b < end_s]

    def tokens_per_s(self, start_s: float, end_s: float) -> float:
        return sum(start_s <= moment < end_s for times in self.times_s for moment in times) / (end_s - start_s)


@dataclass(frozen=True, slots=True)
class Window:
    """What happened in one stretch of time. Gaps and waits in seconds."""

    gaps_s: list[float]
    tokens_per_s: float
    waits_s: list[float]  # of pictures, until their first token
    pictures_per_s: float
    num_unanswered: int = 0  # pictures that were still waiting when the last one was sent

    def row(self) -> str:
        gaps = f"between tokens {1e3 * self.gap_s(50):5.0f} / {1e3 * self.gap_s(99):5.0f} ms" if self.gaps_s else ""
        waits = f"pictures wait {statistics.median(self.waits_s):5.2f} / {max(self.waits_s):5.2f} s" if self.waits_s else ""
        return f"{self.tokens_per_s:7.1f} tok/s  {gaps:32}  {self.pictures_per_s:6.3f} pictures/s  {waits}"

    def gap_s(self, percent: float) -> float:
        return percentile(self.gaps_s, percent)


class Bench:
    """One server and its clients."""

    def __init__(self, session: aiohttp.ClientSession, server: ServerProcess, model: str, *, seconds: float) -> None:
        self.session, self.server, self.url, self.model, self.seconds = session, server, server.url, model, seconds
        self._seeds = iter(range(1, 1 << 30))

    @contextlib.asynccontextmanager
    async def streams(self) -> AsyncIterator[Streams]:
        """Text streams that run until the end of the block."""
        streams = Streams()
        tasks = [asyncio.create_task(self._stream(streams, number)) for number in range(NUM_STREAMS)]
        try:
            await asyncio.sleep(WARM_UP_S)
            yield streams
            for task in tasks:
                if task.done():
                    task.result()  # a stream that ended is an error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def undisturbed(self, streams: Streams) -> Window:
        started_s = time.perf_counter()
        await asyncio.sleep(self.seconds)
        return self._window(streams, started_s, [], 0.0)

    async def closed_loop(self, streams: Streams) -> Window:
        """As many pictures as go through, `CLOSED_LOOP` at a time."""
        started_s, waits_s = time.perf_counter(), []
        end_s = started_s + self.seconds
        moments: list[float] = []

        async def client() -> None:
            while time.perf_counter() < end_s:
                waits_s.append(await self._picture())
                moments.append(time.perf_counter())

        await asyncio.gather(*(client() for _ in range(CLOSED_LOOP)))
        return self._window(streams, started_s, waits_s, len(moments) / (max(moments) - started_s), end_s=end_s)

    async def open_loop(self, streams: Streams, rate: float) -> Window:
        """Pictures at random moments, `rate` per second on average, whether or not earlier ones are answered."""
        started_s = time.perf_counter()
        tasks: list[asyncio.Task[float]] = []
        for moment in arrivals(rate, self.seconds):
            await asyncio.sleep(max(0.0, started_s + moment - time.perf_counter()))
            tasks.append(asyncio.create_task(self._picture()))
        await asyncio.sleep(max(0.0, started_s + self.seconds - time.perf_counter()))
        end_s = time.perf_counter()
        num_unanswered = sum(not task.done() for task in tasks)
        waits_s = list(await asyncio.gather(*tasks))
        return self._window(streams, started_s, waits_s, rate, num_unanswered=num_unanswered, end_s=end_s)

    async def share_of_prompt_looks(self) -> float:
        """Of the event loop's looks while NUM_AT_ONCE pictures are worked on, those that came at most MAX_LAG_S too late."""
        before = await self._looks()
        await asyncio.gather(*(self._picture() for _ in range(NUM_AT_ONCE)))
        num_prompt, num_looks = (after - earlier for after, earlier in zip(await self._looks(), before, strict=True))
        return num_prompt / num_looks

    async def _looks(self) -> tuple[float, float]:
        """Those within the limit, and all."""
        names = (f'{LAG}_bucket{{le="{MAX_LAG_S}"}}', f"{LAG}_count")
        within, total = [await asyncio.to_thread(self.server.metric, name) for name in names]
        return within, total

    def _window(
        self, streams: Streams, start_s: float, waits_s: list[float], rate: float, *, num_unanswered: int = 0, end_s: float | None = None
    ) -> Window:
        end_s = end_s or time.perf_counter()
        return Window(streams.gaps_s(start_s, end_s), streams.tokens_per_s(start_s, end_s), waits_s, rate, num_unanswered)

    async def _stream(self, streams: Streams, number: int) -> None:
        """The first answers are the ends of longer ones, so that the streams stand at equal distances and all stretches are alike.

        A step of long streams takes twice the time of a step of short ones.
        """
        for num_before in chain([STREAM_TOKENS * number // NUM_STREAMS], repeat(0)):
            num_words, num_tokens = STREAM_WORDS + num_before, STREAM_TOKENS - num_before
            path, body = text_body(self.model, 1000 * number + next(self._seeds), num_words=num_words, num_new_tokens=num_tokens)
            times: list[float] = []
            streams.times_s.append(times)
            async for moment in stream_times(self.session, self.url, path, body):
                times.append(moment)

    async def _picture(self) -> float:
        """Seconds until the first token of an answer about a picture that nobody sent before."""
        path, body = await asyncio.to_thread(image_body, self.model, next(self._seeds), num_new_tokens=PICTURE_TOKENS)
        return (await ask(self.session, self.url, path, body)).token_times_s[0]


def arrivals(rate: float, seconds: float) -> Iterator[float]:
    """Random moments of an even density: one at a random place in each stretch of 1 / rate seconds. The same ones on each call."""
    rng = random.Random(0)
    yield from ((number + rng.random()) / rate for number in range(int(rate * seconds)))


@contextlib.asynccontextmanager
async def bench(folder: Path, flags: Sequence[str], seconds: float) -> AsyncIterator[Bench]:
    with server_process(folder, "--load-format", "dummy", "--log-level", "WARNING", *flags) as server:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600), connector=connector) as session:
            async with session.get(f"{server.url}/v1/models") as response:
                model = (await response.json())["data"][0]["id"]
            found = Bench(session, server, model, seconds=seconds)
            await found._picture()
            yield found


async def sustained(found: Bench, streams: Streams, limit: float) -> tuple[float, Window]:
    """The highest rate of the ladder at which pictures do not pile up and none waits too long."""
    for share in LADDER:
        window = await found.open_loop(streams, share * limit)
        print(f"  at {share * limit:6.3f} pictures/s      {window.row()}, {window.num_unanswered} unanswered", flush=True)
        if max(window.waits_s) <= MAX_WAIT_S and window.num_unanswered <= CLOSED_LOOP / 2:
            return share * limit, window
    raise SystemExit("no rate of the ladder was sustained")


async def measure(folder: Path, seconds: float, flags: Sequence[str]) -> bool:
    async with bench(folder, flags, seconds) as found:
        alone = await found.closed_loop(Streams())
        print(f"pictures alone              {alone.row()}", flush=True)
        async with found.streams() as streams:
            full = await found.closed_loop(streams)
            print(f"both, all that goes through {full.row()}", flush=True)
            rate, _ = await sustained(found, streams, full.pictures_per_s)
            calm = await found.undisturbed(streams)
            print(f"streams alone               {calm.row()}", flush=True)
            mixed = await found.open_loop(streams, 0.8 * rate)
            print(f"both, at 80 % of {rate:6.3f}     {mixed.row()}", flush=True)
            calm_after = await found.undisturbed(streams)
            print(f"streams alone, again        {calm_after.row()}", flush=True)
        promptly = await found.share_of_prompt_looks()
    async with bench(folder, INSIDE, seconds) as found, found.streams() as streams:
        inside = await found.open_loop(streams, 0.8 * rate)
        print(f"encoder in the decode loop  {inside.row()}", flush=True)
    median_s = statistics.mean((calm.gap_s(50), calm_after.gap_s(50)))
    speed = statistics.mean((calm.tokens_per_s, calm_after.tokens_per_s))
    marks: list[tuple[str, float, str, bool]] = []
    marks.append(("sustained rate / rate alone", share := rate / alone.pictures_per_s, ">= 0.5", share >= 0.5))
    marks.append(("p99 gap / undisturbed median", gap := mixed.gap_s(99) / median_s, "<= 2.5", gap <= 2.5))
    marks.append(("tokens/s kept", kept := mixed.tokens_per_s / speed, ">= 0.5", kept >= 0.5))
    marks.append(("longest wait of a picture, s", wait := max(mixed.waits_s), "<= 10", wait <= MAX_WAIT_S))
    marks.append((f"looks of the event loop within {1e3 * MAX_LAG_S:.0f} ms", promptly, ">= 0.99", promptly >= 0.99))
    marks.append(("encoder in the loop: p99 gap / median", inside.gap_s(99) / median_s, "for comparison", True))
    marks.append(("encoder in the loop: tokens/s kept", inside.tokens_per_s / speed, "for comparison", True))
    for name, value, mark, is_met in marks:
        print(f"{name:40} {value:7.2f}   {mark:16} {'' if is_met else 'MISSED'}")
    return all(is_met for *_, is_met in marks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of each stretch that is measured")
    parser.add_argument("flags", nargs="*", help="of the server, after --")
    options: Any = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smolvlm-shape-") as folder:
        is_met = asyncio.run(measure(write_smolvlm_shape(Path(folder)), options.seconds, options.flags))
    sys.exit(0 if is_met else 1)


if __name__ == "__main__":
    main()
