"""What each turn of an interactive session costs: five turns about one picture, with the embedded model.

    python -m benchmarks.sessions            (alone on the machine: other load ruins timings)

Prints for each turn the tokens of its prompt, those that were computed rather than found in the prefix cache, and the time to the first
piece of the answer; beside them the same for the whole conversation sent anew, on a server that has seen nothing of it.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from typing import Any

import requests

from tests.end_to_end.pictures import drawn
from tests.server_process import ServerProcess, data_url, server_process

TURNS = (
    "Describe the image please",
    "Which colour has the shape?",
    "Where is it?",
    "Write one sentence about what we talked about.",
    "Thank you. Was there a second shape?",
)
COUNTERS = ("vlm:prompt_tokens_total", "vlm:prefix_cache_hit_tokens_total")
FIELDS = {"temperature": 0, "request_output_len": 32, "stream": True}


@dataclass(frozen=True, slots=True)
class Turn:
    prompt_tokens: int
    prefilled_tokens: int
    ttft_ms: float
    text: str


def ask(server: ServerProcess, **body: Any) -> Turn:
    before = [server.metric(name) for name in COUNTERS]
    started_s = time.perf_counter()
    with requests.post(f"{server.url}/v1/chat/interactive", json={**FIELDS, **body}, stream=True, timeout=600) as response:
        response.raise_for_status()
        lines = response.iter_lines()
        pieces = [json.loads(next(lines))]
        ttft_ms = 1e3 * (time.perf_counter() - started_s)
        pieces += [json.loads(line) for line in lines]
    asked, cached = (server.metric(name) - count for name, count in zip(COUNTERS, before, strict=True))
    return Turn(int(asked), int(asked - cached), ttft_ms, "".join(piece["text"] for piece in pieces))


def session(server: ServerProcess, number: int) -> tuple[list[Turn], list[dict[str, Any]]]:
    """The turns of one session about one picture, and the conversation as messages, each answer after its question."""
    url = data_url(drawn(number))
    turns, messages = [], []
    for place, prompt in enumerate(TURNS):
        picture = {"image_url": url} if place == 0 else {}
        turns.append(ask(server, prompt=prompt, session_id=number, interactive_mode=True, **picture))
        image = [{"type": "image_url", "image_url": {"url": url}}] if place == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": prompt}]})
        messages.append({"role": "assistant", "content": turns[-1].text})
    return turns, messages


def anew(server: ServerProcess, messages: list[dict[str, Any]]) -> list[Turn]:
    """The same prompts where no earlier turn is in a cache."""
    return [ask(server, prompt=messages[: 2 * place + 1]) for place in range(len(TURNS))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    kept, conversations = [], []
    with server_process(None) as server:
        session(server, 99)  # loads what the first request loads
        for number in range(rounds):
            turns, messages = session(server, number)
            kept.append(turns)
            conversations.append(messages)
    with server_process(None, "--no-enable-prefix-caching", "--embedding-cache-bytes", "0") as server:
        anew(server, conversations[0])
        cold = [anew(server, messages) for messages in conversations]
    report(kept, cold)


def report(kept: list[list[Turn]], cold: list[list[Turn]]) -> None:
    print(f"median of {len(kept)} sessions, each about another picture")
    print("turn  prompt tokens  prefilled in the session  TTFT, ms  sent anew: prefilled  TTFT, ms")
    for place in range(len(TURNS)):
        ours, theirs = [turns[place] for turns in kept], [turns[place] for turns in cold]
        print(
            f"{place + 1:4}  {_median(turn.prompt_tokens for turn in ours):13.0f}  {_median(turn.prefilled_tokens for turn in ours):24.0f}"
            f"  {_median(turn.ttft_ms for turn in ours):8.0f}  {_median(turn.prefilled_tokens for turn in theirs):20.0f}"
            f"  {_median(turn.ttft_ms for turn in theirs):8.0f}"
        )


def _median(values: Any) -> float:
    return statistics.median_low(list(values))


if __name__ == "__main__":
    main()
