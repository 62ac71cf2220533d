"""Nobody starves and nobody large holds up the others: the scheduler with a runner that computes nothing and a picture encoded per step."""

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.request import QueueFullError
from tests.engine.scheduling import add, make_scheduler, say

BUDGET = 8
NUM_IMAGE_TOKENS = 2


class World:
    """One step encodes one picture and computes one plan. Requests end with their first token unless they are given more."""

    def __init__(self, *, max_batch_size: int = 64, max_waiting: int = 1024, num_blocks: int = 1500, session_len: int = 1000) -> None:
        self.scheduler = make_scheduler(
            num_blocks,
            eos_token_ids=(),
            session_len=session_len,
            max_batch_size=max_batch_size,
            max_prefill_token_num=BUDGET,
            max_waiting=max_waiting,
        )
        self.num_steps = 0
        self.encoded: list[str] = []  # whose picture, step by step
        self.arrived: dict[str, int] = {}  # request → step
        self.begun: dict[str, int] = {}  # their first token
        self.ended: dict[str, int] = {}
        self.orders: dict[str, tuple[int, int]] = {}

    def add(self, name: str, *, num_images: int = 0, num_tokens: int = 1, tenant: str = "", max_tokens: int | None = 1) -> None:
        pictures = [part for index in range(num_images) for part in ((f"{name}/{index}", NUM_IMAGE_TOKENS), [1])]
        number = 1000 * len(self.arrived)  # no two prompts begin alike
        add(self.scheduler, name, [number], *pictures, range(number, number + num_tokens), tenant=tenant, max_tokens=max_tokens)
        self.arrived[name] = self.num_steps
        self.orders[name] = self.scheduler._rows[name].order

    def step(self) -> None:
        for image in self.scheduler.images_needed()[:1]:
            self.scheduler.encoding_begun()
            self.scheduler.image_ready(image.content_hash)
            self.encoded.append(image.content_hash.decode().split("/")[0])
        plan = self.scheduler.schedule()
        self.num_steps += 1
        for output in self.scheduler.commit(plan, say(plan)):
            self.begun.setdefault(output.request_id, self.num_steps)
            if output.finish_reason is not None:
                self.ended[output.request_id] = self.num_steps
        self.scheduler.check()

    def steps_until_ended(self, name: str, *, at_most: int = 10_000) -> int:
        while name not in self.ended:
            assert self.num_steps - self.arrived[name] < at_most, f"{name} waits for ever"
            self.step()
        return self.ended[name] - self.arrived[name]

    def num_running(self, tenant: str) -> int:
        return sum(row.tenant == tenant for row in self.scheduler._running)

    def num_blocks(self, tenant: str) -> int:
        return sum(len(row.table.block_ids) for row in self.scheduler._running if row.tenant == tenant)


def test_a_request_with_one_picture_does_not_wait_for_one_with_forty() -> None:
    world = World()
    world.add("forty", num_images=40)
    world.step()

    world.add("one", num_images=1)

    assert world.steps_until_ended("one") <= 4
    assert world.steps_until_ended("forty") <= 50


def test_forty_pictures_and_single_ones_that_never_stop_coming_share_the_encoder() -> None:
    world = World()
    world.add("forty", num_images=40)

    while "forty" not in world.ended:
        if world.num_steps % 2:
            world.add(f"one, {world.num_steps}", num_images=1)
        world.step()

    assert world.encoded[:80].count("forty") == 40
    assert world.ended["forty"] <= 100
    assert max(world.ended[name] - world.arrived[name] for name in world.ended if name != "forty") <= 6


def test_forty_pictures_are_encoded_though_more_come_than_the_encoder_can_do() -> None:
    world = World()
    world.add("forty", num_images=40)

    while "forty" not in world.ended:
        world.add(f"one, {world.num_steps}", num_images=1)
        world.step()

    assert world.encoded[:80].count("forty") == 40


def test_two_requests_with_many_pictures_end_in_the_order_of_their_arrival() -> None:
    world = World()
    world.add("first", num_images=10)
    world.add("second", num_images=10)

    world.steps_until_ended("second")

    assert world.ended["first"] < world.ended["second"]


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    world = World()
    world.add("long", num_tokens=40 * BUDGET)
    world.step()

    world.add("short", num_tokens=3)

    assert world.steps_until_ended("short") <= 2
    assert world.steps_until_ended("long") <= 43


def test_a_long_prompt_gets_every_other_step_though_short_ones_never_stop_coming() -> None:
    world = World()
    world.add("long", num_tokens=20 * BUDGET)

    while "long" not in world.ended:
        world.add(f"short, {world.num_steps}", num_tokens=BUDGET - 1)
        world.step()

    assert world.ended["long"] <= 2 * 22


def test_requests_that_wait_for_pictures_keep_no_text_from_running() -> None:
    world = World(max_batch_size=4)
    for number in range(20):
        world.add(f"picture {number}", num_images=1)

    world.add("text")

    assert world.steps_until_ended("text") <= 4


def test_one_keys_queue_does_not_hold_up_another_keys_single_request() -> None:
    world = World(max_batch_size=1)
    for number in range(200):
        world.add(f"a{number}", tenant="a")
    for _ in range(10):
        world.step()

    world.add("b", tenant="b")

    assert world.steps_until_ended("b") <= 2


def test_a_key_with_a_queue_is_served_though_another_never_stops_asking() -> None:
    world = World(max_batch_size=1)
    for number in range(50):
        world.add(f"a{number}", tenant="a")

    while "a49" not in world.ended:
        world.add(f"b{world.num_steps}", tenant="b")
        world.step()

    assert world.ended["a49"] <= 2 * 50 + 1
    assert [world.ended[f"a{number}"] for number in range(50)] == sorted(world.ended[f"a{number}"] for number in range(50))


def test_without_keys_requests_keep_the_order_of_their_arrival() -> None:
    world = World(max_batch_size=1)
    for number in range(20):
        world.add(str(number), num_tokens=1 + 3 * number % 20)

    world.steps_until_ended("19")

    assert list(world.ended) == [str(number) for number in range(20)]


def test_a_full_room_lets_in_one_request_of_each_key_that_has_none_there() -> None:
    world = World(max_waiting=3)
    for number in range(3):
        world.add(f"a{number}", tenant="a")

    assert list(_refused(world, ["a", "", "b", "b", "c", "a"])) == ["a", "", "b", "a"]


def _refused(world: World, tenants: Sequence[str]) -> Iterator[str]:
    for number, tenant in enumerate(tenants):
        try:
            world.add(f"late {number}", tenant=tenant)
        except QueueFullError:
            yield tenant


def add_many(world: World, tenant: str, count: int, *, num_tokens: int = 1) -> None:
    """Requests whose answers end with the window."""
    for number in range(count):
        world.add(f"{tenant}{number}", tenant=tenant, num_tokens=num_tokens, max_tokens=None)


def run_steps(world: World, count: int) -> None:
    for _ in range(count):
        world.step()


def test_a_key_whose_endless_answers_fill_the_batch_makes_way_for_another_key_at_once() -> None:
    world = World()
    add_many(world, "a", 64)
    run_steps(world, 30)
    assert world.num_running("a") == 64

    world.add("b", tenant="b")

    assert world.steps_until_ended("b") <= 2
    assert world.scheduler.num_preemptions == 1


def test_a_key_whose_long_answers_fill_the_cache_makes_way_for_another_key_at_once() -> None:
    world = World(num_blocks=250)
    add_many(world, "a", 8, num_tokens=100)
    run_steps(world, 125)
    assert world.num_blocks("a") > 230

    world.add("b", tenant="b", num_tokens=60)

    assert world.steps_until_ended("b") <= 2 + 60 // BUDGET + 1


def test_a_key_alone_has_the_whole_batch_and_the_whole_cache() -> None:
    world = World()
    add_many(world, "a", 100)
    run_steps(world, 30)

    assert world.num_running("a") == 64
    while world.scheduler.num_preemptions == 0:
        world.step()
    assert world.num_blocks("a") > 1500 - 64


def test_two_keys_with_endless_answers_end_up_with_three_quarters_and_one_and_stay_there() -> None:
    world = World()
    add_many(world, "a", 100)
    run_steps(world, 30)

    add_many(world, "b", 100)
    run_steps(world, 40)

    assert (world.num_running("a"), world.num_running("b")) == (48, 16)
    assert world.scheduler.num_preemptions == 16


def test_keys_that_come_later_get_a_row_though_two_others_share_the_batch() -> None:
    world = World()
    add_many(world, "a", 64)
    add_many(world, "b", 64)
    run_steps(world, 60)

    for tenant in "cde":
        world.add(tenant, tenant=tenant)

        assert world.steps_until_ended(tenant) <= 2


def test_a_key_that_never_stops_asking_leaves_another_its_oldest_answers() -> None:
    world = World(max_batch_size=4)
    add_many(world, "a", 4)
    run_steps(world, 10)

    while "a0" not in world.ended:
        for number in range(2):
            world.add(f"b{world.num_steps}/{number}", tenant="b")
        world.step()

    assert world.ended["a0"] == world.begun["a0"] + 997


def test_the_requests_of_no_key_keep_their_rows() -> None:
    world = World(max_batch_size=4)
    add_many(world, "", 8)
    run_steps(world, 10)

    world.add("late", tenant="")
    run_steps(world, 100)

    assert world.scheduler.num_preemptions == 0
    assert "late" not in world.begun


def test_nothing_is_preempted_where_it_would_be_in_vain() -> None:
    """More blocks than the others' young rows have: what the oldest row holds is not to be had."""
    world = World(num_blocks=250)
    world.add("a, old", tenant="a", num_tokens=700, max_tokens=None)
    run_steps(world, 90)
    world.add("a, young", tenant="a", max_tokens=None)
    run_steps(world, 2)

    world.add("b", tenant="b", num_tokens=600)
    run_steps(world, 10)

    assert world.scheduler.num_preemptions == 0
    assert world.steps_until_ended("b") < 1000


ENDLESS = st.lists(
    st.tuples(st.integers(0, 8), st.sampled_from("abc"), st.integers(1, 3 * BUDGET), st.sampled_from([1, 10, 90])),
    min_size=10,
    max_size=40,
)


def test_tenants_that_ask_again_at_once_do_not_starve_another_ones_second_request() -> None:
    """Each of the others sends a request when its last one has ended, and has no other one waiting."""
    world = World(max_batch_size=2)
    world.add("first", tenant="two requests", max_tokens=3)
    world.add("second", tenant="two requests", max_tokens=3)
    others = ("b", "c", "d")

    while "second" not in world.ended:
        for tenant in others:
            if not any(request.prompt.tenant == tenant for request in world.scheduler.requests.values()):
                world.add(f"{tenant} {world.num_steps}", tenant=tenant, max_tokens=3)
        world.step()
        assert world.num_steps < 100, "it waits for ever"

    assert len(world.ended) < 4 * len(others)


def test_requests_that_were_left_before_their_turn_cost_their_tenant_nothing() -> None:
    world = World(max_batch_size=1)
    world.add("runs", tenant="b", max_tokens=50)
    world.step()
    for number in range(20):
        world.add(str(number), tenant="a")
    for number in range(20):
        world.scheduler.abort(str(number))

    world.add("next", tenant="a")
    world.add("newcomer", tenant="c")

    assert world.orders["next"][0] == world.orders["newcomer"][0]


@pytest.mark.parametrize(("num_tokens", "num_wanted"), [(3, 59), (7, 55), (11, 51)])
def test_who_made_way_takes_none_of_it_back(num_tokens: int, num_wanted: int) -> None:
    """All but one block are wanted: the one that every running row must find when it needs its next."""
    world = World(max_batch_size=8, num_blocks=20, session_len=80)
    world.add("older", num_tokens=3, tenant="a", max_tokens=20)
    world.add("younger", num_tokens=num_tokens, tenant="a", max_tokens=20)
    for _ in range(3):
        world.step()
    world.add("wants", num_tokens=num_wanted, tenant="b")

    world.step()

    assert [row.request.request_id for row in world.scheduler._running] == ["older", "wants"]


@given(ENDLESS, st.sampled_from([40, 60, 400]))
@settings(max_examples=40, deadline=None)
def test_no_key_waits_long_for_a_row_while_another_holds_more_than_its_share(
    arrivals: list[tuple[int, str, int, int]], num_blocks: int
) -> None:
    """Arrivals: steps before it, tenant, tokens of the prompt and of the answer."""
    world, waited = World(max_batch_size=4, num_blocks=num_blocks, session_len=160), dict.fromkeys("abc", 0)

    def step() -> None:
        world.step()
        waiting = {row.tenant for row in world.scheduler._waiting}
        for tenant in waited:
            is_locked_out = tenant in waiting and world.num_running(tenant) == 0
            others = max(world.num_running(other) for other in waited if other != tenant)
            waited[tenant] = waited[tenant] + 1 if is_locked_out and others > 3 else 0
            assert waited[tenant] <= 2, f"{tenant} waits"

    for number, (pause, tenant, num_tokens, max_tokens) in enumerate(arrivals):
        for _ in range(pause):
            step()
        world.add(str(number), tenant=tenant, num_tokens=num_tokens, max_tokens=max_tokens)
    while world.scheduler.has_work:
        step()

    assert len(world.ended) == len(arrivals)


ARRIVALS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 12), st.integers(1, 6 * BUDGET), st.sampled_from(["", "a", "b"])), min_size=1, max_size=25
)


@given(ARRIVALS)
@settings(max_examples=60, deadline=None)
def test_nobody_waits_for_more_than_twice_the_work_before_it_whatever_comes(arrivals: list[tuple[int, int, int, str]]) -> None:
    """Arrivals: steps before it, pictures, tokens, tenant. A stage is a picture, a step of prefill, or a change from one to the other."""
    world, num_stages = World(), dict[str, int]()
    for number, (pause, num_images, num_tokens, tenant) in enumerate(arrivals):
        for _ in range(pause):
            world.step()
        world.add(str(number), num_images=num_images, num_tokens=num_tokens, tenant=tenant)
        num_prompt_tokens = 1 + num_images * (NUM_IMAGE_TOKENS + 1) + num_tokens
        num_stages[str(number)] = 2 * num_images + 1 - (-num_prompt_tokens // BUDGET)

    for name in num_stages:
        world.steps_until_ended(name)

    for name, order in world.orders.items():
        before = sum(num_stages[other] for other in num_stages if world.orders[other] <= order)
        assert world.ended[name] - world.arrived[name] <= 2 * before, f"{name} of {arrivals}"
