"""What a grammar costs: 16 text streams with and without a JSON schema, in turn, on one server and the same prompts.

    python -m benchmarks.guided            (alone on the machine: other load ruins timings)

The schema asks for more items than there are tokens, so that every answer has the same length.
"""

import argparse
import asyncio
import statistics
from typing import Any

from benchmarks.load import Figures, model_name, run, text_body
from tests.server_process import server_process

NUM_STREAMS = 16
ITEM = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square", "star"]},
        "label": {"type": "string", "minLength": 10, "maxLength": 40},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "position": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
    },
    "required": ["shape", "label", "count", "position"],
    "additionalProperties": False,
}
GUIDED: dict[str, Any] = {"structured_outputs": {"json": {"type": "array", "items": ITEM, "minItems": 100}}, "ignore_eos": False}


def measure(url: str, fields: dict[str, Any], *, seed: int) -> Figures:
    model = asyncio.run(model_name(url))
    bodies = [text_body(model, seed * 1000 + i) for i in range(NUM_STREAMS)]
    return asyncio.run(run(url, [(path, {**body, **fields}) for path, body in bodies], num_streams=NUM_STREAMS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    ratios = []
    with server_process(None, "--max-batch-size", str(NUM_STREAMS)) as server:
        measure(server.url, GUIDED, seed=999)
        for seed in range(rounds):
            order = [{}, GUIDED] if seed % 2 else [GUIDED, {}]  # neither is always the warmer one
            figures = {bool(fields): measure(server.url, fields, seed=2 * seed + bool(fields)) for fields in order}
            ratios.append(figures[True].tokens_per_s / figures[False].tokens_per_s)
            print(f"free    {figures[False].row()}\nguided  {figures[True].row()}   {ratios[-1]:.3f}", flush=True)
    print(f"guided / free, median of {rounds}: {statistics.median(ratios):.3f} (wanted: at least 0.9)")


if __name__ == "__main__":
    main()
