"""Nobody starves and nobody large holds up the others: the scheduler with a runner that computes nothing and a picture encoded per step."""

from collections.abc import Iterator, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.request import ImageInput, ImageSpan, Prompt, QueueFullError, Request, SampledToken, SamplingParams, make_cache_keys
from engine.scheduler import Scheduler

BUDGET = 8
IMAGE = 99
NUM_IMAGE_TOKENS = 2


class World:
    """One step encodes one picture and computes one plan. Requests end with their first token."""

    def __init__(self, *, max_batch_size: int = 64, max_waiting: int = 1024) -> None:
        config = EngineConfig(
            model_folder="",
            session_len=1000,
            max_batch_size=max_batch_size,
            max_prefill_token_num=BUDGET,
            max_waiting=max_waiting,
            cache_block_seq_len=4,
        )
        self.scheduler = Scheduler(config, num_blocks=1500, eos_token_ids=())
        self.num_steps = 0
        self.encoded: list[str] = []  # whose picture, step by step
        self.arrived: dict[str, int] = {}  # request → step
        self.ended: dict[str, int] = {}
        self.orders: dict[str, tuple[int, int]] = {}

    def add(self, name: str, *, num_images: int = 0, num_tokens: int = 1, tenant: str = "") -> None:
        images = tuple(ImageInput(f"{name}/{index}".encode(), NUM_IMAGE_TOKENS, {}) for index in range(num_images))
        spans = tuple(ImageSpan(1 + index * (NUM_IMAGE_TOKENS + 1), NUM_IMAGE_TOKENS, index) for index in range(num_images))
        number = 1000 * len(self.arrived)  # no two prompts begin alike
        token_ids = [number, *([IMAGE] * NUM_IMAGE_TOKENS + [1]) * num_images, *range(number, number + num_tokens)]
        keys = make_cache_keys(token_ids, images, spans)
        prompt = Prompt(token_ids=tuple(token_ids), cache_keys=keys, images=images, spans=spans, tenant=tenant)
        self.scheduler.add(Request(name, prompt, SamplingParams(max_tokens=1)))
        self.arrived[name] = self.num_steps
        self.orders[name] = self.scheduler._rows[name].order

    def step(self) -> None:
        for image in self.scheduler.images_needed()[:1]:
            self.scheduler.encoding_begun()
            self.scheduler.image_ready(image.content_hash)
            self.encoded.append(image.content_hash.decode().split("/")[0])
        plan = self.scheduler.schedule()
        self.num_steps += 1
        for output in self.scheduler.commit(plan, {chunk.request_id: SampledToken(5) for chunk in plan.chunks if chunk.samples}):
            self.ended[output.request_id] = self.num_steps
        self.scheduler.check()

    def steps_until_ended(self, name: str, *, at_most: int = 10_000) -> int:
        while name not in self.ended:
            assert self.num_steps - self.arrived[name] < at_most, f"{name} waits for ever"
            self.step()
        return self.ended[name] - self.arrived[name]


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
