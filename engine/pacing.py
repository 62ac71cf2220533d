"""How much prefill and encoding may stand between two tokens of the rows that decode. Plain arithmetic over measured times.

A step of decoding rows takes what it takes; everything else that a step does is held to a share of the time, so that running answers keep
flowing while prompts and pictures come in. Knows nothing of requests, tensors or clocks: it is told what steps took.
"""

from collections import deque

import numpy as np

MIN_PREFILL_TOKENS = 32  # in a step, however long that takes: fewer are not faster, since the weights are read once per step
MIN_ENCODE_S = 0.002  # after a step, so that a picture gets on whatever else is to be done

_NUM_STEPS = 48  # of each kind that are looked at
_FIT_EVERY = 8
_SCALE = np.array([1.0, 32.0, 256.0])  # a step, rows, tokens: what was not varied is taken to cost little
_RIDGE = 1e-3
_NUM_FITS = 6
_EXACT = 0.02  # of a step's time: errors below it count as one another


class Pace:
    """One engine's. share: of the time that prefill and encoding together may take while rows decode.

    A step's time is taken to be a + b · decoding rows + c · prompt tokens, by least absolute errors over the last ones: steps that other
    processes held up count little. (Iteratively reweighted least squares: Holland and Welsch, 1977.)
    """

    def __init__(self, share: float, *, max_prefill_tokens: int) -> None:
        self._others_ratio = share / (1 - share)
        self._max_prefill_tokens = max_prefill_tokens
        # Rows, tokens, seconds. Apart, so that what a token costs is still known after a long time without prefill.
        self._decode_steps: deque[tuple[int, int, float]] = deque(maxlen=_NUM_STEPS)
        self._prefill_steps: deque[tuple[int, int, float]] = deque(maxlen=_NUM_STEPS)
        self._num_new = 0
        self._costs_s: tuple[float, float, float] | None = None  # a, b, c

    def prefill_tokens(self, *, num_decoding: int, num_prefilling: int, num_images: int = 0) -> int:
        """How many prompt tokens the next step may compute.

        Beside rows that decode as many as take the time that others may have, half of it while pictures want theirs, or more where more
        rows wait for their first token than decode. num_images: that are to be encoded.
        """
        if not num_decoding or self._costs_s is None or self._costs_s[2] <= 0:
            return self._max_prefill_tokens
        ratio = self._ratio(num_prefilling + num_images) / (2 if num_images else 1)
        allowed_s = self._decode_s(num_decoding) * max(ratio, num_prefilling / num_decoding)
        return min(self._max_prefill_tokens, max(MIN_PREFILL_TOKENS, int(allowed_s / self._costs_s[2])))

    def encode_s(self, step_s: float, *, num_decoding: int, num_prefilling: int, num_images: int) -> float:
        """For how long pictures may be encoded after a step that took `step_s`, prefill included.

        Until the time is up that rows wait for their next tokens where everything else has the time that it may have: what a step takes
        longer than others of so many decoding rows is not added to their wait, but taken from the pictures' time.
        """
        if self._costs_s is None:
            return MIN_ENCODE_S
        ratio = self._ratio(num_prefilling + num_images)
        return max(MIN_ENCODE_S, self._decode_s(num_decoding) * (1 + ratio) - step_s)

    def stepped(self, step_s: float, *, num_decoding: int, num_prefill_tokens: int) -> None:
        """A step has been computed; `step_s` without what was encoded beside it."""
        steps = self._prefill_steps if num_prefill_tokens else self._decode_steps
        steps.append((num_decoding, num_prefill_tokens, step_s))
        self._num_new += 1
        if self._num_new >= _FIT_EVERY or self._costs_s is None:
            self._fit()

    def _ratio(self, num_waiting: int) -> float:
        """Of a decoding step's time, how much others may have: all of their share from three of them on, and less where fewer wait.

        So the work is spread where it is not so much, instead of being done in the steps after it came, and tokens flow more evenly.
        """
        return self._others_ratio * min(1.0, (2 + num_waiting) / 5)

    def _decode_s(self, num_decoding: int) -> float:
        assert self._costs_s is not None
        return max(0.0, self._costs_s[0] + self._costs_s[1] * num_decoding)

    def _fit(self) -> None:
        self._num_new = 0
        steps = np.array([*self._decode_steps, *self._prefill_steps], dtype=np.float64)
        features = np.column_stack([np.ones(len(steps)), steps[:, :2]]) / _SCALE
        weights = 1 / steps[:, 2].clip(min=1e-6)  # errors count in proportion: one long prefill does not drown the decode steps
        left, ridge = features * weights[:, None], _RIDGE * np.eye(3) * np.mean(weights) ** 2
        trust = np.ones(len(steps))
        for _ in range(_NUM_FITS):
            solution = np.linalg.solve(left.T @ (trust[:, None] * left) + ridge, left.T @ trust)
            trust = 1 / np.abs(left @ solution - 1).clip(min=_EXACT)
            trust /= np.mean(trust)
        step_s, row_s, token_s = (solution / _SCALE).tolist()
        self._costs_s = step_s, row_s, token_s
