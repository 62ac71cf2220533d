"""A load client for any OpenAI-compatible server: time to first token, time between tokens, tokens per second.

    python -m benchmarks.load --url http://127.0.0.1:23333 --case text --streams 16

Text requests are random words of a fixed count; image requests a distinct JPEG and a question. Greedy, streamed, end tokens ignored.
"""

import argparse
import asyncio
import base64
import io
import json
import random
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

WORDS = (
    "time",
    "water",
    "red",
    "stone",
    "river",
    "house",
    "green",
    "light",
    "small",
    "paper",
    "wind",
    "road",
    "blue",
    "hand",
    "tree",
    "day",
)
REQUEST_TIMEOUT_S = 600


@dataclass(slots=True)
class Stream:
    """One request's arrival times, in seconds since it was sent."""

    token_times_s: list[float] = field(default_factory=list)
    num_tokens: int = 0  # as the server's usage says


@dataclass(frozen=True, slots=True)
class Figures:
    """What a run gave. Times in milliseconds."""

    num_requests: int
    requests_per_s: float
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    gap_p50_ms: float
    gap_p99_ms: float

    def row(self) -> str:
        return (
            f"{self.requests_per_s:7.3f} req/s {self.tokens_per_s:8.1f} tok/s   TTFT {self.ttft_p50_ms:6.0f} / {self.ttft_p99_ms:6.0f} ms"
            f"   between tokens {self.gap_p50_ms:5.1f} / {self.gap_p99_ms:6.1f} ms"
        )


def text_body(model: str, seed: int, *, num_words: int = 128, num_new_tokens: int = 128) -> tuple[str, dict[str, Any]]:
    """Path and body of a completion: a distinct prompt of about `num_words` tokens."""
    rng = random.Random(seed)
    prompt = " ".join(rng.choices(WORDS, k=num_words))
    return "/v1/completions", {"model": model, "prompt": prompt, "max_tokens": num_new_tokens}


def image_body(model: str, seed: int, *, side_px: int = 512, num_words: int = 32, num_new_tokens: int = 32) -> tuple[str, dict[str, Any]]:
    """Path and body of a chat about a distinct picture."""
    rng = random.Random(seed)
    pixels = np.random.default_rng(seed).integers(0, 256, (side_px // 16, side_px // 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((side_px, side_px)).save(buffer, "JPEG")
    url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": " ".join(rng.choices(WORDS, k=num_words))}]
    return "/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": num_new_tokens}


async def ask(session: aiohttp.ClientSession, url: str, path: str, body: dict[str, Any]) -> Stream:
    stream, started = Stream(), time.perf_counter()
    async for chunk, moment in chunks(session, url, path, body):
        if chunk["choices"]:
            stream.token_times_s.append(moment - started)
        if chunk.get("usage"):
            stream.num_tokens = chunk["usage"]["completion_tokens"]
    return stream


async def stream_times(session: aiohttp.ClientSession, url: str, path: str, body: dict[str, Any]) -> AsyncIterator[float]:
    """When each piece of one answer came, as it comes, in seconds of the process's clock."""
    async for chunk, moment in chunks(session, url, path, body):
        if chunk["choices"]:
            yield moment


async def chunks(session: aiohttp.ClientSession, url: str, path: str, body: dict[str, Any]) -> AsyncIterator[tuple[dict[str, Any], float]]:
    """The chunks of one streamed answer and when each came."""
    body = {"temperature": 0, "ignore_eos": True, **body, "stream": True, "stream_options": {"include_usage": True}}
    async with session.post(url + path, json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                yield json.loads(line[6:]), time.perf_counter()


async def run(url: str, bodies: list[tuple[str, dict[str, Any]]], *, num_streams: int) -> Figures:
    """Send all bodies, `num_streams` at a time."""
    waiting = iter(bodies)
    streams: list[Stream] = []
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)

    async def worker(session: aiohttp.ClientSession) -> None:
        for path, body in waiting:
            streams.append(await ask(session, url, path, body))

    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        started = time.perf_counter()
        await asyncio.gather(*(worker(session) for _ in range(num_streams)))
        elapsed_s = time.perf_counter() - started
    return figures(streams, elapsed_s)


def figures(streams: list[Stream], elapsed_s: float) -> Figures:
    firsts = [1e3 * stream.token_times_s[0] for stream in streams]
    gaps = [1e3 * (b - a) for stream in streams for a, b in zip(stream.token_times_s, stream.token_times_s[1:], strict=False)]
    return Figures(
        num_requests=len(streams),
        requests_per_s=len(streams) / elapsed_s,
        tokens_per_s=sum(stream.num_tokens for stream in streams) / elapsed_s,
        ttft_p50_ms=statistics.median(firsts),
        ttft_p99_ms=percentile(firsts, 99),
        gap_p50_ms=statistics.median(gaps) if gaps else 0.0,
        gap_p99_ms=percentile(gaps, 99) if gaps else 0.0,
    )


def percentile(values: list[float], percent: float) -> float:
    return float(np.percentile(np.array(values), percent))


async def model_name(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/models") as response:
        return str((await response.json())["data"][0]["id"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:23333")
    parser.add_argument("--case", choices=("text", "image"), default="text")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--requests", type=int, help="default: twice the streams")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make = text_body if options.case == "text" else image_body
    model = asyncio.run(model_name(options.url))
    bodies = [make(model, options.seed + i) for i in range(options.requests or 2 * options.streams)]
    print(f"{options.case}, {options.streams:3}: {asyncio.run(run(options.url, bodies, num_streams=options.streams)).row()}")


if __name__ == "__main__":
    main()
