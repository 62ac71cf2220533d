"""An amount of something that all requests share: who wants more than is free waits briefly, in order of arrival, and is refused then.

No owner gets all of it: the last quarter is for others. Who holds some already goes before those who are new, since only who gets on gives
back. Two that wait for each other are no deadlock: the wait of one ends. Knows nothing of what is counted.
"""

import asyncio
import heapq
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

MIN_RETRY_S = 1
MAX_RETRY_S = 60
UNKNOWN_RETRY_S = 5  # before anything was given back
RATE_WINDOW_S = 30.0  # what was given back longer ago says little of how fast the next is


class BudgetFullError(Exception):
    """Nothing came free in time; try again after `retry_after_s` seconds."""

    def __init__(self, budget: str, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.budget = budget
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetStats:
    used: int
    limit: int
    num_waiting: int
    num_refused: int  # since the start


_Queue = tuple[bool, tuple[str, ...]]  # whether they are new, and the owners of all who wait in it


@dataclass(slots=True, eq=False)
class _Waiter:
    reservation: "Reservation"
    amount: int
    is_new: bool
    number: int  # of arrival
    turn: "asyncio.Future[None]"

    @property
    def queue(self) -> "_Queue":
        return self.is_new, self.reservation.owners

    @property
    def has_turn(self) -> bool:
        return self.turn.done() and not self.turn.cancelled()


class Reservation:
    """A part of a budget, until `release()`. As a context manager it is released at the block's end."""

    def __init__(self, budget: "Budget", owners: tuple[str, ...]) -> None:
        self.owners = owners
        self.amount = 0  # what counts: never more than one owner may have
        self.asked = 0  # what it was asked for in all
        self.is_released = False
        self._budget = budget

    async def resize(self, amount: int) -> None:
        """Hold so much from now on. Waits where that is more than before. Raises BudgetFullError, and then holds what it did."""
        if amount > self.asked:
            await self._budget._take(self, amount, continues=True)
        else:
            self._budget._give_back(self, amount)

    async def grow(self, amount: int) -> None:
        """As `resize`, by so much more."""
        await self.resize(self.asked + amount)

    def moved(self) -> "Reservation":
        """All of it as another reservation, which the block of this one does not release."""
        other = Reservation(self._budget, self.owners)
        other.amount, other.asked, self.amount, self.asked = self.amount, self.asked, 0, 0
        return other

    def release(self) -> None:
        """May be called twice."""
        self.is_released = True
        self._budget._give_back(self, 0)

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class Budget:
    """At most `limit` units are held. One event loop owns it.

    What is larger than an owner may have counts as that much: it goes in alone, and the limit of one thing is somebody else's to keep.
    """

    def __init__(self, name: str, limit: int, *, wait_s: float | None, unit: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        """wait_s: for how long one waits before it is refused; None: for as long as the caller does. unit: for the refusal's sentence."""
        assert limit >= 1, f"{name}: a budget of {limit}"
        self.name = name
        self.limit = limit
        self.share = limit - max(1, limit // 4) if limit > 1 else 1  # of one owner
        self.used = 0
        self.num_refused = 0
        self._wait_s = wait_s
        self._unit = unit or name
        self._given_back = _Rate(clock)
        self._used_by: Counter[str] = Counter()
        self.num_waiting = 0
        self._waiting: dict[_Queue, deque[_Waiter]] = {}  # each in order of arrival
        self._num_wanted = 0  # by all of them
        self._num_arrived = 0

    def stats(self) -> BudgetStats:
        return BudgetStats(used=self.used, limit=self.limit, num_waiting=self.num_waiting, num_refused=self.num_refused)

    def used_by(self, owner: str) -> int:
        return self._used_by[owner]

    async def reserve(self, amount: int, *owners: str, continues: bool = False, is_patient: bool = False) -> Reservation:
        """The caller's to release. Raises BudgetFullError.

        owners: each may hold `share` at most; none: nobody in particular. continues: goes before new ones, as growing does.
        is_patient: waits for as long as the caller does.
        """
        reservation = Reservation(self, tuple(owner for owner in owners if owner))
        await self._take(reservation, amount, continues=continues, is_patient=is_patient)
        return reservation

    async def _take(self, reservation: Reservation, asked: int, *, continues: bool, is_patient: bool = False) -> None:
        """Let a reservation hold as much as `asked` is counted for."""
        assert not reservation.is_released, f"{self.name}: grows after its release"
        more = self._counted(reservation, asked) - reservation.amount
        if more and (self.num_waiting or not self._grant(reservation, more)):
            self._num_arrived += 1
            turn = asyncio.get_running_loop().create_future()
            await self._wait_for_turn(_Waiter(reservation, more, not continues, self._num_arrived, turn), is_patient)
        reservation.asked = asked
        if reservation.is_released:  # while it waited
            self._give_back(reservation, 0)

    def _counted(self, reservation: Reservation, asked: int) -> int:
        return min(asked, self.share if reservation.owners else self.limit)

    async def _wait_for_turn(self, waiter: _Waiter, is_patient: bool) -> None:
        self._join(waiter)
        try:
            async with asyncio.timeout(None if is_patient else self._wait_s):
                await waiter.turn
        except TimeoutError:
            if not waiter.has_turn:  # else it came at the last moment
                raise self._refusal() from None
        except asyncio.CancelledError:
            if waiter.has_turn:
                self._put_back(waiter.reservation, waiter.amount)
            raise
        finally:
            if not waiter.has_turn:
                self._leave(waiter)
                self._serve()  # those behind it may be smaller

    def _join(self, waiter: _Waiter) -> None:
        queue = self._waiting.setdefault(waiter.queue, deque())
        queue.append(waiter)
        self.num_waiting += 1
        self._num_wanted += waiter.amount
        if len(queue) == 1:  # else it comes after those who wait already
            self._serve()

    def _leave(self, waiter: _Waiter) -> None:
        queue = self._waiting[waiter.queue]
        queue.remove(waiter)
        self.num_waiting -= 1
        self._num_wanted -= waiter.amount
        if not queue:
            del self._waiting[waiter.queue]

    def _serve(self) -> None:
        """Give turns, first to those who go on, in order. Who waits only for other things of its own owners holds up nobody else.

        Takes as long as there are queues, however many wait in them.
        """
        if not self.num_waiting or self.used == self.limit:
            return
        full: set[str] = set()  # owners of whom one waits already: those behind it are not to overtake it
        heads = [(is_new, queue[0].number, queue) for (is_new, _), queue in self._waiting.items()]
        heapq.heapify(heads)
        while heads:
            is_new, _, queue = heapq.heappop(heads)
            waiter = queue[0]
            full.update(self._without_room(waiter.reservation, waiter.amount))
            if waiter.turn.done() or not full.isdisjoint(waiter.reservation.owners):  # done: cancelled, and about to leave
                continue
            if not self._grant(waiter.reservation, waiter.amount):
                return
            self._leave(waiter)
            waiter.turn.set_result(None)
            if queue:
                heapq.heappush(heads, (is_new, queue[0].number, queue))

    def _without_room(self, reservation: Reservation, more: int) -> list[str]:
        """Those of the owners who would have more than their share."""
        return [owner for owner in reservation.owners if self._used_by[owner] + more > self.share]

    def _grant(self, reservation: Reservation, more: int) -> bool:
        if self.used + more > self.limit or self._without_room(reservation, more):
            return False
        reservation.amount += more
        self.used += more
        self._used_by.update(dict.fromkeys(reservation.owners, more))
        return True

    def _give_back(self, reservation: Reservation, asked: int) -> None:
        """Let a reservation hold no more than `asked`."""
        less = reservation.amount - self._counted(reservation, asked)
        reservation.asked = asked
        if less > 0:
            self._given_back.add(less)
            self._put_back(reservation, less)

    def _put_back(self, reservation: Reservation, less: int) -> None:
        reservation.amount -= less
        self.used -= less
        for owner in reservation.owners:
            self._used_by[owner] -= less
            if not self._used_by[owner]:
                del self._used_by[owner]
        self._serve()

    def _refusal(self) -> BudgetFullError:
        self.num_refused += 1
        use = f"{self.used} of {self.limit} {self._unit} are in use, and no client or host may have more than {self.share}"
        return BudgetFullError(self.name, f"the server is busy: {use}; try again later", retry_after_s=self.retry_after_s())

    @property
    def is_measured(self) -> bool:
        """Whether anything was given back yet."""
        return self._given_back.per_s() > 0

    def retry_after_s(self, amount: int = 0) -> int:
        """When all who wait now, and `amount` more, may have what they want, if things go on as they did."""
        wanted = max(1, amount + self._num_wanted)
        per_s = self._given_back.per_s()
        if not per_s:
            return UNKNOWN_RETRY_S
        return MAX_RETRY_S if per_s * MAX_RETRY_S < wanted else max(MIN_RETRY_S, math.ceil(wanted / per_s))


def places_for(num_workers: int) -> int:
    """The limit of a budget of places for jobs: one owner can keep all workers busy with one job to spare, and others find a place."""
    return num_workers + 1 + (num_workers + 1) // 3 + 1


class _Rate:
    """How much per second, the last half minute counting most."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started_s = clock()
        self._last_s = self._started_s
        self._amount = 0.0

    def add(self, amount: int) -> None:
        self._fade()
        self._amount += amount

    def per_s(self) -> float:
        """Of a rate that has only just begun, its mean so far."""
        self._fade()
        faded = 1 - math.exp(-max(1.0, self._last_s - self._started_s) / RATE_WINDOW_S)
        return self._amount / (RATE_WINDOW_S * faded)

    def _fade(self) -> None:
        now_s = self._clock()
        self._amount *= math.exp((self._last_s - now_s) / RATE_WINDOW_S)
        self._last_s = now_s


class SharedReservations:
    """Reservations by key: what several hold together counts once, from the first one's until the last one lets go."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._held: dict[object, tuple[Reservation, int]] = {}  # with the number of those who hold it

    def __len__(self) -> int:
        return len(self._held)

    async def hold(self, key: object, amount: int, *owners: str) -> Callable[[], None]:
        """How to let go, once. Raises BudgetFullError."""
        if key in self._held:
            return self._one_more(key)
        return self.adopt(key, await self._budget.reserve(amount, *owners, continues=True))

    def adopt(self, key: object, reservation: Reservation) -> Callable[[], None]:
        """As `hold`, with a reservation that the caller has; it is released where others hold the key already."""
        if key in self._held:
            reservation.release()
        else:
            self._held[key] = reservation, 0
        return self._one_more(key)

    def _one_more(self, key: object) -> Callable[[], None]:
        reservation, num_holders = self._held[key]
        self._held[key] = reservation, num_holders + 1
        return lambda: self._let_go(key)

    def _let_go(self, key: object) -> None:
        reservation, num_holders = self._held[key]
        if num_holders > 1:
            self._held[key] = reservation, num_holders - 1
            return
        del self._held[key]
        reservation.release()
