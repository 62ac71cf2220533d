import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.slices import Slices

MAX_S = 0.1


class Tower:
    """Layers of the same operators, computed in slices on a clock of its own."""

    def __init__(self, operators_s: list[float], num_layers: int) -> None:
        self.slices = Slices()
        self.operators_s = operators_s
        self.places = [number for _ in range(num_layers) for number in range(len(operators_s))]
        self.now_s = 0.0
        self.num_done = 0
        self._is_paused = False

    @property
    def is_done(self) -> bool:
        return self.num_done == len(self.places)

    def run(self, budget_s: float) -> float:
        """Seconds taken."""
        started_s = self.now_s
        if not self.slices.begin(budget_s, self.now_s):
            return 0.0
        if self._is_paused:
            self.slices.resume(self.now_s)
            self._compute()
        while not self.is_done and self.slices.passes(str(self.places[self.num_done]), self.now_s):
            self._compute()
        self._is_paused = not self.is_done
        self.slices.end(self.now_s)
        return self.now_s - started_s

    def _compute(self) -> None:
        self.now_s += self.operators_s[self.places[self.num_done]]
        self.num_done += 1


operators = st.lists(st.floats(0.001, MAX_S), min_size=1, max_size=6)


@given(operators, st.integers(2, 8), st.floats(0.0005, 0.3))
def test_every_slice_is_close_to_its_budget_once_a_layer_is_known(operators_s, num_layers, budget_s):
    tower = Tower(operators_s, num_layers)

    while not tower.is_done:
        is_known = tower.num_done > len(operators_s)
        before_s = tower.slices.credit_s
        taken_s = tower.run(budget_s)

        if is_known and taken_s:
            assert taken_s <= before_s + budget_s + max(operators_s) / 2 + 1e-9


@given(operators, st.integers(1, 8), st.lists(st.floats(0.0005, 0.3), min_size=1, max_size=5))
def test_the_budgets_are_kept_on_average(operators_s, num_layers, budgets_s):
    tower = Tower(operators_s, num_layers)

    given_s = taken_s = 0.0
    number = 0
    while not tower.is_done:
        budget_s = budgets_s[number % len(budgets_s)]
        given_s += budget_s
        taken_s += tower.run(budget_s)
        number += 1

        assert taken_s <= given_s + max(operators_s) + 1e-9
        if not tower.is_done:
            assert given_s - taken_s <= max(operators_s) / 2 + 1e-9  # nothing that was given is left lying


def test_a_budget_that_is_too_short_for_an_operator_adds_up():
    tower = Tower([1.0], 3)
    taken_s = [tower.run(0.1) for _ in range(40)]

    assert sum(taken_s) == pytest.approx(3.0)
    assert max(taken_s) == 1.0
