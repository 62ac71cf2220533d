"""Turns alone, as plain numbers."""

from hypothesis import given
from hypothesis import strategies as st

from engine.turns import TenantTurns, by_turns


def test_every_other_turn_is_the_first_ones_and_those_between_the_smallest_ones() -> None:
    items = ["aaaa", "bbb", "cc", "d"]

    assert list(by_turns(items, len, smallest_next=False)) == ["aaaa", "d", "bbb", "cc"]
    assert list(by_turns(items, len, smallest_next=True)) == ["d", "aaaa", "cc", "bbb"]


@given(st.lists(st.integers(0, 5).map(lambda size: [size])), st.booleans())
def test_everybody_has_one_turn_and_nobody_waits_twice_as_long_as_in_line(items: list[list[int]], smallest_next: bool) -> None:
    taken = [id(item) for item in by_turns(items, lambda item: item[0], smallest_next=smallest_next)]

    assert sorted(taken) == sorted(map(id, items))
    assert all(taken.index(id(item)) <= 2 * place + 1 for place, item in enumerate(items))


def test_a_tenant_that_comes_late_stands_behind_whoever_was_let_in_last() -> None:
    turns = TenantTurns()
    first = turns.place("a", [])
    second = turns.place("a", [(first, 3)])
    third = turns.place("a", [(first, 3), (second, 1)])
    turns.begun("a", first, 3)

    assert (first, second, third) == (0, 3, 4)
    assert turns.place("b", []) == 0
    turns.begun("a", second, 1)
    turns.begun("a", first, 3)  # it was preempted and comes back
    assert turns.place("b", []) == 3


def test_a_tenant_stands_behind_its_own_work_also_when_that_is_done() -> None:
    turns = TenantTurns()
    turns.begun("a", turns.place("a", []), 2)
    turns.begun("b", turns.place("b", []), 1)

    assert turns.place("a", []) == 2
    assert turns.place("b", []) == 1


def test_an_old_request_that_still_waits_brings_no_new_one_forward() -> None:
    turns = TenantTurns()
    old = turns.place("a", [])
    for _ in range(10):
        turns.begun("b", turns.place("b", []), 1)

    assert turns.place("a", [(old, 1)]) == turns.place("c", []) == 9


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4)), min_size=1, max_size=40), st.integers(0, 3))
def test_a_waiting_tenant_is_passed_by_at_most_as_much_of_each_other_one(arrivals: list[tuple[str, int]], num_let_in: int) -> None:
    """After each arrival `num_let_in` are let in. Whoever is let in before another tenant's earlier request took no more turns than it."""
    turns, waiting = TenantTurns(), list[tuple[int, int, str, int]]()
    let_in = list[tuple[int, int, str, int]]()
    for number, (tenant, cost) in enumerate(arrivals):
        place = turns.place(tenant, [(place, cost) for place, _, owner, cost in waiting if owner == tenant])
        waiting.append((place, number, tenant, cost))
        waiting.sort()
        for entry in waiting[:num_let_in]:
            turns.begun(entry[2], entry[0], entry[3])
            let_in.append(entry)
        del waiting[:num_let_in]
    let_in += waiting

    for tenant in "abc":
        own = [number for _, number, owner, _ in let_in if owner == tenant]
        assert own == sorted(own), "a tenant's own requests keep their order"
    for at, (_, number, tenant, _) in enumerate(let_in):
        own_before = sum(cost for _, earlier, owner, cost in let_in[:at] if owner == tenant)
        for other in {"a", "b", "c"} - {tenant}:
            passed = [cost for _, later, owner, cost in let_in[:at] if owner == other and later > number]
            assert sum(passed) <= own_before + max(passed, default=0)
