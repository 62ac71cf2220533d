"""What a GPU must show. `--smoke`: the tiny checkpoints decode on CUDA in float32 to the same tokens as on the CPU.

python -m benchmarks.gpu --smoke
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.core import Engine
from engine.models.registry import load_config
from engine.request import Prompt, SamplingParams
from tests.tiny_models import text_model_names, write_tiny


def greedy(folder: Path, device: str) -> list[list[int]]:
    """Four prompts' next 32 tokens, all in one batch."""
    text = load_config(str(folder)).get_text_config()
    config = EngineConfig(model_folder=str(folder), device=device, dtype="float32", session_len=256, max_batch_size=4)
    engine = Engine(config.resolve({"text_config": text.to_dict()}))
    tokens: dict[str, list[int]] = {str(i): [] for i in range(4)}
    for name in tokens:
        token_ids = tuple(range(3 + int(name), 40 + int(name)))
        engine.add(name, Prompt(token_ids=token_ids, cache_keys=token_ids), SamplingParams(max_tokens=32, temperature=0, ignore_eos=True))
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    engine.scheduler.check()
    engine.close()
    return list(tokens.values())


def smoke() -> int:
    """How many checkpoints differ."""
    torch.backends.cuda.matmul.allow_tf32 = False
    num_different = 0
    for name in text_model_names():
        with tempfile.TemporaryDirectory() as folder:
            write_tiny(name, Path(folder))
            is_equal = greedy(Path(folder), "cuda") == greedy(Path(folder), "cpu")
        print(f"{name:16} {'equal' if is_equal else 'DIFFERENT'}")
        num_different += not is_equal
    return num_different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", required=True)
    parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here")
    sys.exit(smoke())


if __name__ == "__main__":
    main()
