"""When a computation that can pause at named places has had its time. Plain arithmetic; knows nothing of threads or of pictures.

Moments are seconds of a clock that never goes back; the caller reads it.
"""


class Slices:
    """One computation's budgets. On average they are kept; one slice is off by half an operator at most, once a layer has been timed.

    The layers of a tower are alike: how long the way from one place to the next takes is known from the layer before. A way is gone where
    at least half of it lies within what the budgets have left.
    """

    def __init__(self) -> None:
        self.credit_s = 0.0  # budgets so far, less what was taken
        self._started_s = 0.0  # of this slice
        self._place: str | None = None  # passed last
        self._passed_s = 0.0
        self._took_s: dict[str, float] = {}  # place → the way from there to the next one

    def begin(self, budget_s: float, now_s: float) -> bool:
        """Add to the budget; whether a slice begins. It does not where the next way is too long for what there is."""
        self.credit_s += budget_s
        self._started_s = now_s
        return self._place is None or self._fits(self._place, now_s)

    def passes(self, place: str, now_s: float) -> bool:
        """Whether the slice goes on at `place`, which it has reached. If not, `resume` follows before the next place."""
        if self._place is not None:
            self._took_s[self._place] = now_s - self._passed_s
        self._place, self._passed_s = place, now_s
        return self._fits(place, now_s)

    def end(self, now_s: float) -> None:
        """The slice has paused, or the computation is done."""
        self.credit_s -= now_s - self._started_s

    def resume(self, now_s: float) -> None:
        """The next slice goes on at the place of the pause."""
        self._passed_s = now_s

    def _fits(self, place: str, now_s: float) -> bool:
        return now_s - self._started_s + self._took_s.get(place, 0.0) / 2 < self.credit_s
