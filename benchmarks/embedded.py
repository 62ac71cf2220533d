"""The embedded model's first figures: our server and the reference's `generate`, in turn, in one run on the same work.

    python -m benchmarks.embedded            (alone on the machine: other load ruins timings)

Prints one row per case, the ratios that mark a healthy spine, and the server's own CPU time per streamed token.
"""

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path

from benchmarks.load import Figures, image_body, model_name, run, text_body
from tests.server_process import server_process

NUM_NEW_TOKENS = 128
TEXT_STREAMS = (1, 16, 64)
IMAGE_STREAMS = (1, 8)


def cpu_s(process_id: int) -> float:
    """CPU seconds of one process so far, without its children."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(url: str, case: str, streams: int, *, seed: int) -> Figures:
    make = text_body if case == "text" else image_body
    model = asyncio.run(model_name(url))
    bodies = [make(model, seed * 1000 + i) for i in range(max(3, streams))]
    return asyncio.run(run(url, bodies, num_streams=streams))


class Reference:
    """`transformers` alone: one text request at a time, as its `generate` works."""

    def __init__(self) -> None:
        import vision  # noqa: F401 - makes torchvision importable beside a CPU-only torch

        # isort: split
        import torch
        from transformers import AutoModelForImageTextToText, AutoTokenizer

        from vlm_server.embedded import embedded_model_folder

        folder = embedded_model_folder()
        self._torch = torch
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def tokens_per_s(self, seed: int) -> float:
        """Prefill and decoding of one request together, as a client would see them."""
        prompt = text_body("", seed)[1]["prompt"]
        inputs = self._tokenizer(prompt, return_tensors="pt")
        started = time.perf_counter()
        with self._torch.inference_mode():
            self._model.generate(**inputs, max_new_tokens=NUM_NEW_TOKENS, min_new_tokens=NUM_NEW_TOKENS, do_sample=False)
        return NUM_NEW_TOKENS / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    reference = Reference()
    reference.tokens_per_s(0)
    theirs: list[float] = []
    ours: dict[tuple[str, int], list[Figures]] = {}
    per_token_us: list[float] = []
    with server_process(None, "--max-batch-size", "64") as server:
        url, process_id = server.url, server.process.pid
        measure(url, "image", 1, seed=99)
        for number in range(rounds):
            theirs.append(reference.tokens_per_s(number))
            for case, streams in [("text", n) for n in TEXT_STREAMS] + [("image", n) for n in IMAGE_STREAMS]:
                before = cpu_s(process_id)
                result = measure(url, case, streams, seed=number)
                ours.setdefault((case, streams), []).append(result)
                if (case, streams) == ("text", 16):
                    per_token_us.append(1e6 * (cpu_s(process_id) - before) / (result.num_requests * NUM_NEW_TOKENS))
    report(ours, theirs, per_token_us)


def report(ours: dict[tuple[str, int], list[Figures]], theirs: list[float], per_token_us: list[float]) -> None:
    print(f"median (lower one) of {len(theirs)} rounds; text: 128 in, 128 out; image: one 512 × 512 JPEG and 32 words in, 32 out")
    print(f"{'transformers, text, 1':22} {statistics.median_low(theirs):8.1f} tok/s")
    for (case, streams), results in ours.items():
        print(f"{f'ours, {case}, {streams}':22} {sorted(results, key=lambda result: result.tokens_per_s)[(len(results) - 1) // 2].row()}")
    speed = {key: statistics.median_low([result.tokens_per_s for result in results]) for key, results in ours.items()}
    one = speed["text", 1]
    for name, value, mark in (
        ("one stream / transformers", one / statistics.median_low(theirs), ">= 1.2"),
        ("16 streams / one", speed["text", 16] / one, ">= 5"),
        ("64 streams / one", speed["text", 64] / one, ">= 7"),
        ("server CPU per token, µs", statistics.median(per_token_us), "<= 300"),
    ):
        print(f"{name:28} {value:8.2f}   mark {mark}")


if __name__ == "__main__":
    main()
