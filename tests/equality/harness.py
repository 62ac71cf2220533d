"""The reference's greedy answers beside the engine's, token by token and logit by logit.

A first different token is forgiven only where the reference's two best logits lie within `TIE`, in at most 1 % of the prompts, and printed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.core import Engine
from engine.model_runner import Executed
from engine.models.registry import load_config
from engine.request import Plan, Prompt, SamplingParams

TIE = 1e-4
MAX_TIED_SHARE = 0.01


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    logits: Tensor  # (num_new_tokens, vocab_size) float32: the model's own, before end tokens are masked


@torch.inference_mode()
def reference_answer(model: Any, inputs: Mapping[str, Tensor], *, num_new_tokens: int, eos_token_ids: Sequence[int]) -> Answer:
    """What `transformers` generates greedily, end tokens masked."""
    out = model.generate(
        **inputs,
        max_new_tokens=num_new_tokens,
        min_new_tokens=num_new_tokens,
        do_sample=False,
        num_beams=1,
        suppress_tokens=list(eos_token_ids) or None,
        repetition_penalty=1.0,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return Answer(out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(out.logits).float())


class RecordingEngine:
    """An engine that keeps every row's logits; its KV blocks are checked when it closes."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        config = load_config(str(folder))
        settings = {"max_batch_size": 64, "session_len": 2048, "device": "cpu", **settings}
        self.engine = Engine(
            EngineConfig(model_folder=str(folder), **settings).resolve({"text_config": config.get_text_config().to_dict()})
        )
        self.plans: list[Plan] = []
        self._logits: dict[str, list[Tensor]] = {}
        self._execute = self.engine.ranks.execute
        self.engine.ranks.execute = self._record  # type: ignore[method-assign]
        self._num_asked = 0

    def answers(self, prompts: Sequence[Prompt], *, num_new_tokens: int, together: bool = True) -> list[Answer]:
        if not together:
            return [self.answers([prompt], num_new_tokens=num_new_tokens)[0] for prompt in prompts]
        request_ids = [self._add(prompt, num_new_tokens) for prompt in prompts]
        tokens: dict[str, list[int]] = {request_id: [] for request_id in request_ids}
        while self.engine.has_work:
            for output in self.engine.step():
                assert output.error is None, output.error
                tokens[output.request_id] += output.token_ids
            self.engine.scheduler.check()
        return [Answer(tokens[request_id], torch.stack(self._logits.pop(request_id))) for request_id in request_ids]

    def close(self) -> None:
        self.engine.scheduler.check()
        assert self.engine.stats().num_referenced_blocks == 0
        self.engine.close()

    def __enter__(self) -> "RecordingEngine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _add(self, prompt: Prompt, num_new_tokens: int) -> str:
        self._num_asked += 1
        request_id = f"request-{self._num_asked}"
        self._logits[request_id] = []
        self.engine.add(request_id, prompt, SamplingParams(max_tokens=num_new_tokens, temperature=0, ignore_eos=True))
        return request_id

    def _record(self, plan: Plan, embeddings: Mapping[bytes, Tensor]) -> Executed:
        self.plans.append(plan)
        executed = self._execute(plan, embeddings)
        for row, request_id in enumerate(executed.sample_ids):
            assert executed.logits is not None
            self._logits[request_id].append(executed.logits[row].clone())
        return executed


def assert_equal(answers: Sequence[Answer], references: Sequence[Answer], *, tolerance: float = 1e-4) -> None:
    """Every step's logits within `tolerance` of the reference's largest, and the same tokens but for ties."""
    num_tied = 0
    for number, (ours, theirs) in enumerate(zip(answers, references, strict=True)):
        step = _first_difference(ours.token_ids, theirs.token_ids)
        compared = slice(0, len(theirs.token_ids) if step is None else step + 1)  # behind a different token nothing compares
        error = _relative_error(ours.logits[compared], theirs.logits[compared])
        assert error < tolerance, f"prompt {number}: logits differ by {error:.1e} of the largest"
        if step is not None:
            best = theirs.logits[step].topk(2).values
            gap = float(best[0] - best[1])
            print(f"prompt {number}, token {step}: {ours.token_ids[step]} instead of {theirs.token_ids[step]}, logits {gap:.1e} apart")
            assert gap < TIE, f"prompt {number}, token {step}: a different token although the best two logits are {gap:.1e} apart"
            num_tied += 1
    assert num_tied <= MAX_TIED_SHARE * len(references), f"{num_tied} of {len(references)} prompts end in ties"


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    assert len(ours) == len(theirs), f"{len(ours)} tokens instead of {len(theirs)}"
    return next((step for step, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())
