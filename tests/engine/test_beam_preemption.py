"""Beam searches with few blocks, beside others, preempted, aborted and cut short: all end soon, with what they say alone. No tensors."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from engine.beams import Beams, Continuation
from engine.request import FinishReason, InvalidRequestError, Request, StepOutput
from tests.engine.scheduling import EOS, ScriptedRunner, deliver, make_request, make_scheduler, scripted_token

SESSION_LEN = 64


def scripted_offer(keys: Sequence[int], rank: int, num_kept: int) -> list[Continuation]:
    """What the model says after these keys; a beam of another rank draws other numbers."""

    said, draw, noise = scripted_token(keys), random.Random(hash(tuple(keys))), random.Random(rank)
    offers = [Continuation(token_id, -4 * draw.random() * (token_id != said), noise.random()) for token_id in range(29)]
    return sorted(offers, key=lambda offer: -offer.logprob - offer.noise)[:num_kept]


class World:
    """A scheduler with its searches; pictures are encoded at once, and forgotten at once where nobody has pinned them."""

    def __init__(self, *, num_blocks: int = 60, budget: int = 16, prefix: bool = True, max_batch_size: int = 8) -> None:
        self.scheduler = make_scheduler(
            num_blocks,
            session_len=SESSION_LEN,
            max_batch_size=max_batch_size,
            max_prefill_token_num=budget,
            enable_prefix_caching=prefix,
        )
        self.beams = Beams(self.scheduler, (EOS,))
        self.runner = ScriptedRunner(self.scheduler)
        self.answers: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.num_steps = 0
        self.max_steps = 0  # twice the tokens there are to compute: every other step is for whoever needs least

    def add(self, request: Request) -> None:
        """Raises InvalidRequestError."""
        params = request.params
        if params.num_beams > 1:
            self.beams.check(request)
        self.scheduler.add(request)
        if params.num_beams > 1:
            self.beams.begin(request)
        self.answers[request.request_id] = []
        assert params.max_tokens is not None
        self.max_steps += 2 * params.num_beams * (request.num_prompt_tokens + params.max_tokens)

    def step(self, *, is_lost: bool = False, meanwhile: Callable[[], None] = lambda: None) -> None:
        """As `engine.core` does it. is_lost: device memory ran out when all was computed, so whoever has the largest chunk fails."""
        for content_hash in self.runner.embeddings - self.scheduler.pinned_images():
            self.runner.forget(content_hash)
        for image in self.scheduler.images_needed():
            self.runner.encoded(image.content_hash)
        plan = self.scheduler.schedule()
        self.scheduler.check()
        assert plan.chunks or not self.scheduler.has_work, f"nothing to compute: {self.scheduler.requests}"
        sampled = self.runner.execute(plan)
        for beam_id in [request_id for request_id in sampled if self.beams.search_of(request_id)]:
            del sampled[beam_id]
            search, keys = self.beams.search_of(beam_id), self.scheduler.requests[beam_id].cache_keys
            assert search is not None
            self.beams.offer(beam_id, scripted_offer(keys, self.beams.rank(beam_id), search.num_kept))
        if is_lost and plan.chunks:
            self.end(max(plan.chunks, key=lambda chunk: len(chunk.token_ids)).request_id, FinishReason.ERROR)
        else:
            meanwhile()
            self.deliver([*self.scheduler.commit(plan, sampled), *self.beams.advance()])
        self.num_steps += 1
        self.scheduler.check()

    def end(self, request_id: str, reason: FinishReason) -> None:
        output = self.beams.end(request_id, reason) or self.scheduler.abort(request_id)
        assert output is not None
        self.deliver([replace(output, finish_reason=reason)])
        self.scheduler.check()

    def deliver(self, outputs: list[StepOutput]) -> None:
        deliver(outputs, self.answers, self.reasons)

    def run(self) -> None:
        while self.scheduler.has_work:
            assert self.num_steps < self.max_steps, f"never ends: {self.scheduler.requests}"
            self.step()
        assert set(self.answers) == set(self.reasons)
        assert self.scheduler.blocks.num_referenced == 0


def answer_alone(request: Request) -> list[int]:
    world = World()
    world.add(Request(request.request_id, request.prompt, request.params))
    world.run()
    return world.answers[request.request_id]


def random_request(draw: random.Random, name: str) -> Request:
    """Prompts often begin alike; some hold a picture."""
    parts: list[Any] = [[draw.choice((1, 2))] * draw.randint(1, 8), [draw.randint(1, 3) for _ in range(draw.randint(1, 8))]]
    if draw.random() < 0.3:
        parts.insert(draw.randint(0, 2), (draw.choice("xy"), draw.choice((1, 5, 9)), draw.random() < 0.5))
    params = {"num_beams": draw.choice((1, 2, 2, 3)), "max_tokens": draw.randint(4, 36), "ignore_eos": draw.random() < 0.9}
    return make_request(name, *parts, tenant=draw.choice(("", "a", "b")), **params)


def run_at_random(seed: int) -> World:
    """Random requests with few blocks, of which some are aborted, before a step or during one, and some steps are lost."""
    draw = random.Random(seed)
    world = World(
        num_blocks=draw.choice((20, 26, 32)),
        budget=draw.choice((9, 16, 64)),
        prefix=draw.random() < 0.8,
        max_batch_size=draw.choice((6, 16)),
    )
    requests, num_left, is_rough = {}, draw.randint(3, 8), draw.random() < 0.3

    def abort() -> None:
        live = sorted(world.answers.keys() - world.reasons.keys())
        if live:
            world.end(draw.choice(live), FinishReason.ABORT)

    while num_left or world.scheduler.has_work:
        while num_left and (draw.random() < 0.6 or not world.scheduler.has_work):
            request = random_request(draw, str(num_left))
            num_left -= 1
            try:
                world.add(request)
            except InvalidRequestError:
                continue
            requests[request.request_id] = request
        if is_rough and draw.random() < 0.01:
            abort()
        assert world.num_steps <= world.max_steps, f"never ends: {world.scheduler.requests}"
        world.step(is_lost=is_rough and draw.random() < 0.02, meanwhile=abort if is_rough and draw.random() < 0.02 else lambda: None)

    assert set(requests) == set(world.reasons)
    assert world.scheduler.blocks.num_referenced == 0
    for name, request in requests.items():
        if world.reasons[name] in (FinishReason.STOP, FinishReason.LENGTH):
            assert world.answers[name] == answer_alone(request), name
    return world


@pytest.mark.parametrize("seed", range(100))
def test_all_end_soon_with_what_they_say_alone_whatever_happens(seed: int) -> None:
    run_at_random(seed)


def search_of(name: str, num_tokens: int, *, tenant: str = "", num_beams: int = 2, max_tokens: int = 32) -> Request:
    """Searches of different names have nothing in common."""
    prompt = ["pqr".index(name) + 1] * num_tokens
    return make_request(name, prompt, tenant=tenant, num_beams=num_beams, max_tokens=max_tokens, ignore_eos=True)


def preempt(world: World, name: str) -> None:
    world.scheduler._preempt(next(row for row in world.scheduler._running if row.search_id == name))
    world.scheduler.check()


@pytest.mark.parametrize(
    ("num_blocks", "lengths", "tenants"),
    [
        (20, (3, 3, 3), "abb"),  # a computed beam kept its blocks while its sibling waited for some
        (22, (12, 3, 3), "abb"),
        (22, (6, 3, 12), "aab"),
        (28, (7, 7, 7), ("", "", "")),  # a beam was preempted that had made its offer
    ],
)
def test_searches_that_fill_the_cache_together_all_end(num_blocks: int, lengths: Sequence[int], tenants: Sequence[str]) -> None:
    world = World(num_blocks=num_blocks)
    searches = [search_of(*parts, tenant=tenant) for *parts, tenant in zip("pqr", lengths, tenants, strict=True)]
    for search in searches:
        world.add(search)

    world.run()

    assert world.scheduler.num_preemptions > 0
    assert [world.answers[search.request_id] for search in searches] == [answer_alone(search) for search in searches]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("num_steps", range(1, 27))
def test_a_search_that_just_fits_goes_on_where_it_was_whenever_it_is_preempted(prefix: bool, num_steps: int) -> None:
    search, num_blocks = search_of("p", 30, num_beams=3, max_tokens=24), 16
    while True:
        world = World(num_blocks=num_blocks, budget=9, prefix=prefix)
        try:
            world.add(search)
            break
        except InvalidRequestError:
            num_blocks += 1
    for _ in range(num_steps):
        world.step()
    num_rows = len(world.scheduler.requests)

    preempt(world, "p")

    assert (world.scheduler.num_running, world.scheduler.num_waiting) == (0, 1)
    assert len(world.scheduler.requests) == num_rows
    assert world.scheduler.blocks.num_referenced == 0
    world.run()
    assert world.answers["p"] == answer_alone(search)


@pytest.mark.parametrize("num_steps", range(4, 20))
def test_offers_of_before_a_preemption_count_for_nothing(num_steps: int) -> None:
    """All beams make their offers in a step that runs out of memory; then the search is preempted."""
    search = search_of("p", 12, num_beams=3)
    world = World(budget=9)
    world.add(search)
    for _ in range(num_steps):
        world.step()
    world.add(make_request("large", [1] * 30, max_tokens=1))
    world.step(is_lost=True)
    assert world.reasons == {"large": FinishReason.ERROR}

    preempt(world, "p")

    world.run()
    assert world.answers["p"] == answer_alone(search)


def test_a_preempted_search_is_one_of_those_that_wait_and_comes_before_younger_ones() -> None:
    world = World(max_batch_size=4)
    world.add(search_of("p", 12, num_beams=3))
    for _ in range(8):
        world.step()
    world.add(search_of("q", 12, num_beams=3))

    preempt(world, "p")

    assert world.scheduler.num_waiting == 2
    world.step()
    assert {row.search_id for row in world.scheduler._running} == {"p"}
    assert world.scheduler.num_preemptions == 1
    world.run()
