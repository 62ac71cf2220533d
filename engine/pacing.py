"""How much prefill and encoding may stand between two tokens of the rows that decode. Plain arithmetic over measured times.

A step of decoding rows takes what it takes; everything else that a step does is held to a share of the time, so that running answers keep
flowing while prompts and pictures come in. Knows nothing of requests, tensors or clocks: it is told what steps took.
"""

from collections import deque

import numpy as np

MIN_PREFILL_TOKENS = 32  # in a step, however long that takes: fewer are not faster, since the weights are read once per step
MIN_ENCODE_S = 0.002  # beside a step, so that a picture gets on whatever else is to be done

_NUM_STEPS = 64  # that are looked at
_FIT_EVERY = 8
_SCALE = np.array([1.0, 32.0, 256.0])  # a step, rows, tokens: what was not varied is taken to cost little
_RIDGE = 1e-3


class Pace:
    """One engine's. share: of the time that prefill and encoding together may take while rows decode.

    A step's time is taken to be a + b · decoding rows + c · prompt tokens, by least squares over the last ones.
    """

    def __init__(self, share: float, *, max_prefill_tokens: int) -> None:
        self._others_ratio = share / (1 - share)
        self._max_prefill_tokens = max_prefill_tokens
        self._steps: deque[tuple[int, int, float]] = deque(maxlen=_NUM_STEPS)  # rows, tokens, seconds
        self._num_new = 0
        self._costs_s: tuple[float, float, float] | None = None  # a, b, c

    def prefill_tokens(self, *, num_decoding: int, num_prefilling: int) -> int:
        """How many prompt tokens the next step may compute.

        Beside rows that decode as many as take the share of the time, or more where more rows wait for their first token than decode.
        """
        if not num_decoding or self._costs_s is None or self._costs_s[2] <= 0:
            return self._max_prefill_tokens
        allowed_s = self._decode_s(num_decoding) * max(self._others_ratio, num_prefilling / num_decoding)
        return min(self._max_prefill_tokens, max(MIN_PREFILL_TOKENS, int(allowed_s / self._costs_s[2])))

    def encode_s(self, *, num_decoding: int, num_prefill_tokens: int) -> float:
        """For how long pictures may be encoded beside a step of so many decoding rows and prompt tokens."""
        if self._costs_s is None:
            return MIN_ENCODE_S
        prefill_s = max(0.0, self._costs_s[2]) * num_prefill_tokens
        return max(MIN_ENCODE_S, self._decode_s(num_decoding) * self._others_ratio - prefill_s)

    def stepped(self, step_s: float, *, num_decoding: int, num_prefill_tokens: int) -> None:
        """A step has been computed; `step_s` without what was encoded beside it."""
        self._steps.append((num_decoding, num_prefill_tokens, step_s))
        self._num_new += 1
        if self._num_new >= _FIT_EVERY or self._costs_s is None:
            self._fit()

    def _decode_s(self, num_decoding: int) -> float:
        assert self._costs_s is not None
        return max(0.0, self._costs_s[0] + self._costs_s[1] * num_decoding)

    def _fit(self) -> None:
        self._num_new = 0
        steps = np.array(self._steps, dtype=np.float64)
        features = np.column_stack([np.ones(len(steps)), steps[:, :2]]) / _SCALE
        weights = 1 / steps[:, 2].clip(min=1e-6)  # errors count in proportion: one long prefill does not drown the decode steps
        left = features * weights[:, None]
        solution = np.linalg.solve(left.T @ left + _RIDGE * np.eye(3) * np.mean(weights) ** 2, left.T @ np.ones(len(steps)))
        step_s, row_s, token_s = (solution / _SCALE).tolist()
        self._costs_s = step_s, row_s, token_s
