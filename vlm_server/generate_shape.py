"""How `/generate` looks on the wire: LMDeploy's object, whole or in pieces that each hold what is new."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_server.errors import ApiError
from vlm_server.generation import Delta, FinishedAnswer, Usage
from vlm_server.stage_timings import Report, no_report
from vlm_server.streaming import OPENAI_EVENTS

_LOWEST = -9999.0  # for a probability of 0; JSON has no infinity


class GenerateShape:
    """`text`, `output_ids` and `meta_info`. All generated tokens are in `output_ids`, the end token and those of a stop string too."""

    events = OPENAI_EVENTS

    def __init__(
        self,
        *,
        num_prompt_tokens: int,
        returns_logprob: bool,
        warnings: Sequence[str],
        extras: Mapping[str, Any] | None = None,
        report: Report = no_report,
    ) -> None:
        """extras: what else stands beside the warnings. report: the request's timings, where they are asked for."""
        self._num_prompt_tokens = num_prompt_tokens
        self._returns_logprob = returns_logprob
        self._warnings = {**({"warnings": list(warnings)} if warnings else {}), **(extras or {})}
        self._report = report
        self._num_tokens = 0  # of the pieces so far

    def first_chunks(self, num_answers: int, usage: Usage) -> list[dict[str, Any]]:
        return []

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        return [self._piece(delta)]

    def last_chunks(self, usage: Usage) -> list[dict[str, Any]]:
        return []

    def error_chunk(self, error: ApiError, usage: Usage) -> dict[str, Any]:
        return error.body()

    def response(self, answers: list[FinishedAnswer], usage: Usage) -> dict[str, Any]:
        [answer] = answers
        return self._piece(answer)

    def _piece(self, piece: Delta | FinishedAnswer) -> dict[str, Any]:
        self._num_tokens += len(piece.token_ids)
        meta: dict[str, Any] = {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_tokens,
            "finish_reason": {"type": piece.finish_reason} if piece.finish_reason else None,
            "output_token_logprobs": self._logprobs(piece),
            "routed_experts": None,
        }
        if piece.finish_reason:
            meta |= self._report()
        warnings = self._warnings if piece.finish_reason else {}
        return {"text": piece.text, "output_ids": piece.token_ids, "meta_info": meta, **warnings}

    def _logprobs(self, piece: Delta | FinishedAnswer) -> list[tuple[float, int]] | None:
        if not self._returns_logprob:
            return None
        logprobs = [logprob if math.isfinite(logprob) else _LOWEST for logprob in piece.token_logprobs or ()]
        return list(zip(logprobs, piece.token_ids, strict=True))
