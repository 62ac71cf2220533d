import asyncio
from dataclasses import dataclass, field
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vision.budget import Budget, BudgetFullError, Reservation, SharedReservations

LIMIT = 12
OWNERS = ("", "a", "b", "c")

steps = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.integers(0, 2 * LIMIT), st.sampled_from(OWNERS)),
        st.tuples(st.just("resize"), st.integers(0, 30), st.integers(0, 2 * LIMIT)),
        st.tuples(st.just("release"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("cancel at its turn"), st.integers(0, 30), st.just(0)),
    ),
    max_size=40,
)


@dataclass
class Walk:
    """What the steps have begun. One task at a time works with a reservation, as all users of budgets do."""

    budget: Budget = field(default_factory=lambda: Budget("test", LIMIT, wait_s=None))
    held: list[Reservation] = field(default_factory=list)
    waiting: list[tuple[str, asyncio.Task[None]]] = field(default_factory=list)  # new ones with their owner, in order of arrival
    growing: dict[asyncio.Task[None], Reservation] = field(default_factory=dict)

    @property
    def idle(self) -> list[Reservation]:
        return [reservation for reservation in self.held if reservation not in self.growing.values()]

    def take(self, step: tuple[str, int, int | str]) -> None:
        match step:
            case ("reserve", amount, owner):
                self.waiting.append((str(owner), asyncio.ensure_future(self._reserve(int(amount), str(owner)))))
            case ("resize", at, amount) if self.idle:
                reservation = self.idle[at % len(self.idle)]
                task = asyncio.ensure_future(reservation.resize(int(amount)))
                self.growing[task] = reservation
            case ("release", at, _) if self.held:
                self.held[at % len(self.held)].release()  # also of one that waits for more
                del self.held[at % len(self.held)]
            case ("cancel", at, _) if tasks := self._tasks():
                tasks[at % len(tasks)].cancel()
            case ("cancel at its turn", at, _) if (tasks := self._tasks()) and self.idle:
                self.idle[0].release()  # which may give the other its turn
                self.held.remove(self.idle[0])
                tasks[at % len(tasks)].cancel()

    async def settle(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        self.growing = {task: reservation for task, reservation in self.growing.items() if not task.done()}
        for owner in {owner for owner, task in self.waiting if not task.done()}:
            waits = [not task.done() for other, task in self.waiting if other == owner and not task.cancelled()]
            assert waits == sorted(waits), f"one of {owner} overtook another: {waits}"
        self.waiting = [(owner, task) for owner, task in self.waiting if not task.done()]

    def check(self) -> None:
        budget = self.budget
        used = budget.used
        assert used == sum(reservation.amount for reservation in self.held) <= LIMIT
        assert all(budget.used_by(owner) <= budget.share for owner in OWNERS[1:])
        assert budget.num_waiting == len(self.waiting) + len(self.growing)
        full: set[str] = set()
        for waiter in sorted(chain(*budget._waiting.values()), key=lambda waiter: (waiter.is_new, waiter.number)):
            [owner] = waiter.reservation.owners or [""]
            if owner and budget.used_by(owner) + waiter.amount > budget.share:
                full.add(owner)
            if owner not in full:  # the first whom its owner does not keep is kept by the limit
                assert used + waiter.amount > LIMIT
                break

    async def end(self) -> None:
        tasks = self._tasks()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for reservation in self.held:
            reservation.release()

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [task for _, task in self.waiting] + list(self.growing)

    async def _reserve(self, amount: int, owner: str) -> None:
        self.held.append(await self.budget.reserve(amount, owner))


@given(steps)
def test_after_any_steps_the_limit_holds_nothing_is_lost_and_none_is_overtaken(steps: list[tuple[str, int, int | str]]) -> None:
    async def walk() -> None:
        walk = Walk()
        for step in steps:
            walk.take(step)
            await walk.settle()
            walk.check()
        await walk.end()
        assert (walk.budget.used, walk.budget.num_waiting, walk.budget._num_wanted, walk.budget._waiting) == (0, 0, 0, {})
        assert not walk.budget._used_by

    asyncio.run(walk())


async def test_who_finds_no_room_in_time_is_refused_and_counted() -> None:
    budget = Budget("test", 10, wait_s=0.0, unit="test units")
    held, other = await budget.reserve(4), await budget.reserve(4)

    with pytest.raises(BudgetFullError, match="8 of 10 test units are in use") as caught:
        await budget.reserve(3)
    with pytest.raises(BudgetFullError):
        await held.grow(3)

    assert (caught.value.budget, budget.num_refused, budget.num_waiting) == ("test", 2, 0)
    assert (budget.used, held.amount, other.amount) == (8, 4, 4)


async def test_a_patient_one_is_not_refused() -> None:
    budget = Budget("test", 10, wait_s=0.0)
    held = await budget.reserve(8)
    patient = asyncio.create_task(budget.reserve(3, is_patient=True))
    with pytest.raises(BudgetFullError):
        await budget.reserve(3)

    held.release()

    assert (await patient).amount == 3


async def test_two_that_wait_for_each_other_are_no_deadlock() -> None:
    budget = Budget("test", 10, wait_s=0.01)
    first, second = await budget.reserve(5), await budget.reserve(5)

    async def grow(reservation: Reservation) -> None:
        with reservation:
            await reservation.grow(3)

    results = await asyncio.gather(grow(first), grow(second), return_exceptions=True)

    assert any(isinstance(result, BudgetFullError) for result in results)
    assert budget.used == 0


async def test_who_holds_some_goes_before_those_who_are_new() -> None:
    budget = Budget("test", 10, wait_s=None)
    growing, other = await budget.reserve(4), await budget.reserve(6)
    new = asyncio.create_task(budget.reserve(5))
    await asyncio.sleep(0)
    grown = asyncio.create_task(growing.grow(5))
    await asyncio.sleep(0)

    other.release()
    await grown
    assert not new.done()

    growing.release()
    assert (await new).amount == 5


async def test_one_owner_leaves_a_quarter_and_holds_up_nobody() -> None:
    budget = Budget("test", 8, wait_s=0.0)
    greedy = [await budget.reserve(2, "greedy", "host") for _ in range(3)]
    waiting = asyncio.create_task(budget.reserve(2, "greedy", is_patient=True))
    await asyncio.sleep(0)

    assert (await budget.reserve(1, "modest")).amount == 1
    with pytest.raises(BudgetFullError):
        await budget.reserve(1, "other", "host")
    assert not waiting.done()

    greedy[0].release()
    assert (await waiting).amount == 2


async def test_what_is_larger_than_a_share_goes_in_alone() -> None:
    budget = Budget("test", 8, wait_s=0.0)

    huge = await budget.reserve(100, "a")
    assert (huge.amount, huge.asked, budget.used) == (6, 100, 6)
    await huge.grow(50)
    assert budget.used == 6
    await huge.resize(3)
    assert budget.used == 3
    huge.release()
    huge.release()

    assert (await budget.reserve(100)).amount == 8


async def test_when_to_come_again_follows_from_how_fast_room_is_made() -> None:
    now_s = 0.0
    budget = Budget("test", 100, wait_s=0.0, clock=lambda: now_s)
    with pytest.raises(BudgetFullError) as unknown:
        await _overfull(budget)

    for _ in range(60):  # 10 a second
        (await budget.reserve(10)).release()
        now_s += 1.0
    with pytest.raises(BudgetFullError) as slow:
        await _overfull(budget)
    for _ in range(300):  # 1000 a second
        for _ in range(10):
            (await budget.reserve(100)).release()
        now_s += 1.0
    with pytest.raises(BudgetFullError) as fast:
        await _overfull(budget)

    assert (unknown.value.retry_after_s, fast.value.retry_after_s) == (5, 1)
    assert 5 <= slow.value.retry_after_s <= 7, "60 at 10 a second"
    now_s += 1000
    assert budget.retry_after_s() == 60, "nothing comes free any more"


async def _overfull(budget: Budget) -> None:
    reservation = await budget.reserve(100)
    try:
        await budget.reserve(60)
    finally:
        reservation._budget._put_back(reservation, 100)  # as if it had never been: it says nothing of the rate


async def test_what_several_hold_counts_once_until_the_last_lets_go() -> None:
    budget = Budget("test", 10, wait_s=0.0)
    shared = SharedReservations(budget)

    first, second = await asyncio.gather(shared.hold("key", 8), shared.hold("key", 8))
    assert (budget.used, len(shared)) == (8, 1)
    third = shared.adopt("key", await budget.reserve(2))
    assert budget.used == 8

    first(), third()
    assert budget.used == 8
    second()
    assert (budget.used, len(shared)) == (0, 0)


async def test_of_two_who_wait_for_the_same_one_reservation_is_kept() -> None:
    budget = Budget("test", 20, wait_s=None)
    shared = SharedReservations(budget)
    full = await budget.reserve(20)
    holders = [asyncio.create_task(shared.hold("key", 8)) for _ in range(2)]
    await asyncio.sleep(0)

    full.release()
    lets = await asyncio.gather(*holders)

    assert budget.used == 8
    for let_go in lets:
        let_go()
    assert budget.used == 0


async def test_a_moved_reservation_outlives_the_block_of_the_first() -> None:
    budget = Budget("test", 10, wait_s=0.0)

    with await budget.reserve(8, "a") as held:
        moved = held.moved()
    assert (budget.used, budget.used_by("a")) == (8, 8)

    moved.release()
    assert (budget.used, budget.used_by("a")) == (0, 0)
