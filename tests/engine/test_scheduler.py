"""The scheduler by example, and under random operations with a scripted runner that checks everything a real one would rely on."""

import gc
import weakref
import zlib
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.config import EngineConfig
from engine.request import (
    Chunk,
    FinishReason,
    ImageInput,
    ImagePiece,
    ImageSpan,
    InvalidRequestError,
    Plan,
    Prompt,
    PromptTooLongError,
    QueueFullError,
    Request,
    SampledToken,
    SamplingParams,
    StepOutput,
    TokenLogprobs,
    make_cache_keys,
)
from engine.scheduler import MAX_IMAGES_AHEAD, Scheduler

EOS = 0
IMAGE = 99  # placeholder token


def make_config(**settings: Any) -> EngineConfig:
    defaults = {"session_len": 40, "max_batch_size": 4, "max_prefill_token_num": 8, "cache_block_seq_len": 4}
    return EngineConfig(model_folder="", **(defaults | settings))


def make_scheduler(num_blocks: int = 100, **settings: Any) -> Scheduler:
    return Scheduler(make_config(**settings), num_blocks=num_blocks, eos_token_ids=(EOS,))


def make_prompt(*parts: Sequence[int] | tuple[str, int] | tuple[str, int, bool], positions: bool = False, tenant: str = "") -> Prompt:
    """Parts are token ids, or (picture's name, number of its tokens, atomic)."""
    token_ids: list[int] = []
    images: list[ImageInput] = []
    spans: list[ImageSpan] = []
    for part in parts:
        if part and isinstance(part[0], str):
            name, num_tokens, *is_atomic = part
            spans.append(ImageSpan(len(token_ids), num_tokens, len(images), is_atomic=bool(is_atomic and is_atomic[0])))
            images.append(ImageInput(name.encode(), num_tokens, {}))
            token_ids += [IMAGE] * num_tokens
        else:
            token_ids += part
    keys = make_cache_keys(token_ids, images, spans)
    axes = tuple(tuple(10 * axis + slot for slot in range(len(token_ids))) for axis in range(3)) if positions else None
    delta = 100 if positions else 0
    return Prompt(
        token_ids=tuple(token_ids),
        cache_keys=keys,
        images=tuple(images),
        spans=tuple(spans),
        positions=axes,
        position_delta=delta,
        tenant=tenant,
    )


def make_request(request_id: str, *parts: Any, positions: bool = False, tenant: str = "", **params: Any) -> Request:
    return Request(request_id, make_prompt(*parts, positions=positions, tenant=tenant), SamplingParams(**params))


def add(scheduler: Scheduler, request_id: str, *parts: Any, **params: Any) -> Request:
    request = make_request(request_id, *parts, **params)
    scheduler.add(request)
    return request


def step(scheduler: Scheduler, token_id: int = 5) -> tuple[Plan, list[StepOutput]]:
    plan = scheduler.schedule()
    scheduler.check()
    outputs = scheduler.commit(plan, {chunk.request_id: SampledToken(token_id) for chunk in plan.chunks if chunk.samples})
    scheduler.check()
    return plan, outputs


def shape(plan: Plan) -> list[tuple[str, int, int, bool]]:
    return [(chunk.request_id, chunk.start, chunk.start + len(chunk.token_ids), chunk.samples) for chunk in plan.chunks]


def run_out(scheduler: Scheduler, *, max_steps: int = 1_000) -> list[StepOutput]:
    outputs: list[StepOutput] = []
    for _ in range(max_steps):
        if not scheduler.has_work:
            assert scheduler.blocks.num_referenced == 0
            return outputs
        for image in scheduler.images_needed():
            scheduler.image_ready(image.content_hash)
        outputs += step(scheduler)[1]
    raise AssertionError(f"still at work: {scheduler.requests}")


# One request


def test_a_prompt_is_computed_in_chunks_and_then_gets_a_slot_per_step() -> None:
    scheduler = make_scheduler()
    request = add(scheduler, "a", range(10, 22), max_tokens=3)

    plans_and_outputs = [step(scheduler, token_id) for token_id in (5, 6, 7, 8)]

    assert [shape(plan) for plan, _ in plans_and_outputs] == [
        [("a", 0, 8, False)],
        [("a", 8, 12, True)],
        [("a", 12, 13, True)],
        [("a", 13, 14, True)],
    ]
    assert [[output.token_ids for output in outputs] for _, outputs in plans_and_outputs] == [[], [[6]], [[7]], [[8]]]
    assert plans_and_outputs[2][0].chunks[0].token_ids == [6]
    assert request.output_token_ids == [6, 7, 8]
    assert not scheduler.has_work


def test_the_block_of_a_sampled_token_is_taken_when_it_is_computed() -> None:
    scheduler = make_scheduler()
    request = add(scheduler, "a", range(10, 14))

    step(scheduler)
    assert len(request.block_ids) == 1
    plan, _ = step(scheduler)

    assert len(request.block_ids) == 2
    assert plan.chunks[0].block_ids == request.block_ids


def test_only_the_last_output_has_a_finish_reason() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", [1], max_tokens=2)

    first, second = step(scheduler)[1][0], step(scheduler)[1][0]

    assert (first.finish_reason, second.finish_reason) == (None, FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("token_id", "params", "reason"),
    [
        (EOS, {}, FinishReason.STOP),
        (EOS, {"ignore_eos": True}, None),
        (7, {"stop_token_ids": (6, 7)}, FinishReason.STOP),
        (7, {"stop_token_ids": (6, 7), "ignore_eos": True}, FinishReason.STOP),
        (EOS, {"max_tokens": 1}, FinishReason.STOP),
        (7, {"max_tokens": 1}, FinishReason.LENGTH),
        (7, {"max_tokens": 2}, None),
        (7, {}, None),
    ],
)
def test_a_request_ends_for_the_documented_reasons(token_id: int, params: dict[str, Any], reason: FinishReason | None) -> None:
    scheduler = make_scheduler()
    request = add(scheduler, "a", [1], **params)

    output = step(scheduler, token_id)[1][0]

    assert output == StepOutput(request_id="a", token_ids=[token_id], finish_reason=reason)
    assert request.finish_reason is reason
    assert scheduler.has_work is (reason is None)


def test_the_window_ends_a_request() -> None:
    scheduler = make_scheduler(session_len=12)
    request = add(scheduler, "a", range(10, 18))

    outputs = run_out(scheduler)

    assert len(request.token_ids) == 12
    assert [output.finish_reason for output in outputs] == [None, None, None, FinishReason.LENGTH]


def test_logprobs_and_counts_go_with_the_tokens() -> None:
    scheduler = make_scheduler()
    request = add(scheduler, "a", [1])
    logprobs = TokenLogprobs(5, -0.5, 1)

    output = scheduler.commit(scheduler.schedule(), {"a": SampledToken(5, logprobs)})[0]
    step(scheduler)

    assert output.logprobs == [logprobs]
    assert request.output_counts == {5: 2}


def test_positions_come_from_the_prompt_and_go_on_with_its_delta() -> None:
    scheduler = make_scheduler(max_prefill_token_num=2)
    add(scheduler, "a", [1, 2, 3], positions=True)

    positions = [step(scheduler)[0].chunks[0].positions for _ in range(4)]

    assert positions == [([0, 1], [10, 11], [20, 21]), ([2], [12], [22]), ([103], [103], [103]), ([104], [104], [104])]


# What is refused


def test_impossible_requests_are_refused_with_a_reason() -> None:
    scheduler = make_scheduler(session_len=8)
    add(scheduler, "a", [1])

    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        add(scheduler, "a", [1])
    with pytest.raises(InvalidRequestError, match="no tokens"):
        add(scheduler, "b")
    with pytest.raises(PromptTooLongError, match="8 tokens"):
        add(scheduler, "b", range(8))
    assert list(scheduler.requests) == ["a"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache_keys": (1, 2)}, "cache_keys"),
        ({"positions": ((0, 1, 2), (0, 1, 2), (0, 1))}, "positions"),
        ({"spans": (ImageSpan(1, 3, 0),)}, "within 3 slots"),
        ({"spans": (ImageSpan(1, 1, 0), ImageSpan(0, 1, 0))}, "in order"),
        ({"spans": (ImageSpan(0, 0, 0),)}, "in order"),
        ({"spans": (ImageSpan(0, 1, 1),)}, "image 1"),
        ({"spans": (ImageSpan(0, 2, 0, offset=1),)}, "rows"),
    ],
)
def test_prompts_that_contradict_themselves_are_refused(fields: dict[str, Any], message: str) -> None:
    prompt = Prompt(**({"token_ids": (1, 2, 3), "cache_keys": (1, 2, 3), "images": (ImageInput(b"x", 2, {}),)} | fields))

    with pytest.raises(InvalidRequestError, match=message):
        make_scheduler().add(Request("a", prompt, SamplingParams()))


def test_a_full_waiting_room_is_refused() -> None:
    scheduler = make_scheduler(max_waiting=2)
    add(scheduler, "a", [1])
    add(scheduler, "b", [1])

    with pytest.raises(QueueFullError, match="2 requests wait"):
        add(scheduler, "c", [1])

    step(scheduler)
    add(scheduler, "c", [1])


# Batches


def test_decoding_rows_come_first_and_prefill_shares_its_budget_in_order_of_arrival() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", [1, 2])
    step(scheduler)
    add(scheduler, "b", range(10, 15))
    add(scheduler, "c", range(20, 30))
    add(scheduler, "d", range(30, 40))

    assert shape(step(scheduler)[0]) == [("a", 2, 3, True), ("b", 0, 5, True), ("c", 0, 3, False)]
    assert shape(step(scheduler)[0]) == [("a", 3, 4, True), ("b", 5, 6, True), ("c", 3, 10, True), ("d", 0, 1, False)]


def test_at_most_max_batch_size_requests_run() -> None:
    scheduler = make_scheduler(max_batch_size=2)
    for request_id in "abc":
        add(scheduler, request_id, [ord(request_id)], max_tokens=2)

    assert [[chunk.request_id for chunk in step(scheduler)[0].chunks] for _ in range(3)] == [["a", "b"], ["a", "b"], ["c"]]


def test_a_small_request_does_not_overtake_one_that_waits_for_blocks() -> None:
    scheduler = make_scheduler(num_blocks=10, max_prefill_token_num=40)
    add(scheduler, "a", range(20), ignore_eos=True, max_tokens=3)
    step(scheduler)
    add(scheduler, "large", range(100, 130))
    add(scheduler, "small", [1])

    assert [chunk.request_id for chunk in step(scheduler)[0].chunks] == ["a"]
    step(scheduler)
    assert [chunk.request_id for chunk in step(scheduler)[0].chunks] == ["large", "small"]


def test_every_running_row_can_have_its_next_block_when_another_is_admitted() -> None:
    scheduler = make_scheduler(num_blocks=10, max_prefill_token_num=40)
    add(scheduler, "a", range(7))
    step(scheduler)

    add(scheduler, "b", range(100, 132))  # the eight blocks that are left
    assert [chunk.request_id for chunk in step(scheduler)[0].chunks] == ["a"]

    scheduler.abort("b")
    add(scheduler, "c", range(100, 124))
    assert [chunk.request_id for chunk in step(scheduler)[0].chunks] == ["a", "c"]


# Abort and failure


def test_an_abort_gives_the_blocks_back_at_once() -> None:
    scheduler = make_scheduler()
    running, waiting = add(scheduler, "a", range(10, 19)), add(scheduler, "b", range(20, 29))
    step(scheduler)

    outputs = [scheduler.abort("a"), scheduler.abort("b"), scheduler.abort("b"), scheduler.abort("never")]

    assert outputs == [
        StepOutput(request_id="a", finish_reason=FinishReason.ABORT),
        StepOutput(request_id="b", finish_reason=FinishReason.ABORT),
        None,
        None,
    ]
    assert running.finish_reason is waiting.finish_reason is FinishReason.ABORT
    assert scheduler.blocks.num_referenced == 0
    assert not scheduler.has_work
    scheduler.check()


def test_an_abort_between_schedule_and_commit_leaves_the_others_alone() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", [1])
    add(scheduler, "b", [2])
    plan = scheduler.schedule()

    scheduler.abort("a")
    add(scheduler, "a", [3])  # the same id anew
    outputs = scheduler.commit(plan, {"a": SampledToken(5), "b": SampledToken(6)})

    assert [(output.request_id, output.token_ids) for output in outputs] == [("b", [6])]
    assert scheduler.requests["a"].num_computed == 0
    scheduler.check()


def test_a_failed_request_ends_with_its_error() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", [1])

    assert scheduler.fail("a", "no memory") == StepOutput(request_id="a", finish_reason=FinishReason.ERROR, error="no memory")
    assert scheduler.fail("a", "again") is None


# Prefix cache


def test_a_second_turn_computes_only_what_is_new() -> None:
    scheduler = make_scheduler(max_prefill_token_num=64)
    first = add(scheduler, "a", range(10, 20), max_tokens=4)
    run_out(scheduler)
    second = add(scheduler, "b", first.token_ids, [30, 31, 32])

    plan, outputs = step(scheduler)

    assert shape(plan) == [("b", 12, 17, True)]  # 13 slots of the first were computed, 12 of them in full blocks
    assert second.num_cached == outputs[0].num_cached_tokens == 12
    assert (scheduler.num_prompt_tokens, scheduler.num_cached_prompt_tokens) == (27, 12)


def test_equal_prompts_of_one_burst_compute_their_full_blocks_once() -> None:
    scheduler = make_scheduler(max_prefill_token_num=64, max_batch_size=8)
    for request_id in "abcd":
        add(scheduler, request_id, range(10, 20))

    assert shape(step(scheduler)[0]) == [("a", 0, 10, True)]
    assert shape(step(scheduler)[0]) == [("a", 10, 11, True), ("b", 8, 10, True), ("c", 8, 10, True), ("d", 8, 10, True)]
    assert len({tuple(request.block_ids[:2]) for request in scheduler.requests.values()}) == 1
    assert len({request.block_ids[2] for request in scheduler.requests.values()}) == 4


def test_a_burst_waits_until_the_whole_shared_prefix_is_there_while_others_go_on() -> None:
    scheduler = make_scheduler(max_prefill_token_num=8, max_batch_size=8)
    add(scheduler, "a", range(10, 27))
    add(scheduler, "b", range(10, 22), [7])
    add(scheduler, "c", [1, 2])

    plans = [shape(step(scheduler)[0]) for _ in range(4)]

    assert plans[0] == [("a", 0, 8, False)]
    assert plans[1] == [("c", 0, 2, True), ("a", 8, 14, False)]
    assert plans[2] == [("c", 2, 3, True), ("a", 14, 17, True), ("b", 12, 13, True)]


def test_others_pass_a_request_that_waits_for_a_shared_block() -> None:
    scheduler = make_scheduler(max_prefill_token_num=12, max_batch_size=8)
    add(scheduler, "a", range(10, 20))
    add(scheduler, "b", range(10, 20))
    add(scheduler, "c", [1, 2])

    assert shape(step(scheduler)[0]) == [("a", 0, 10, True), ("c", 0, 2, True)]


@pytest.mark.parametrize("leave", ["abort", "fail"])
def test_whoever_waits_for_a_shared_block_goes_on_when_its_leader_leaves(leave: str) -> None:
    scheduler = make_scheduler(max_prefill_token_num=4)
    add(scheduler, "a", range(10, 20))
    add(scheduler, "b", range(10, 20))
    step(scheduler)

    if leave == "abort":
        scheduler.abort("a")
    else:
        scheduler.fail("a", "broken")

    assert shape(step(scheduler)[0]) == [("b", 4, 8, False)]


def test_without_prefix_caching_equal_prompts_are_computed_side_by_side() -> None:
    scheduler = make_scheduler(max_prefill_token_num=64, enable_prefix_caching=False)
    add(scheduler, "a", range(10, 20))
    add(scheduler, "b", range(10, 20))

    assert shape(step(scheduler)[0]) == [("a", 0, 10, True), ("b", 0, 10, True)]


# Preemption


def test_the_youngest_is_preempted_and_goes_on_where_it_was() -> None:
    scheduler = make_scheduler(num_blocks=5, session_len=16, max_prefill_token_num=64, enable_prefix_caching=False)
    old = add(scheduler, "old", range(10, 17), max_tokens=8)
    young = add(scheduler, "young", range(20, 27), max_tokens=3)
    step(scheduler, 1)
    step(scheduler, 2)  # both have eight slots; a third block each is one too many
    plan, _ = step(scheduler, 3)

    assert shape(plan) == [("old", 8, 9, True)]
    assert (young.num_preemptions, young.num_computed, young.block_ids) == (1, 0, [])
    assert young.output_token_ids == [1, 2]
    outputs = run_out(scheduler)

    assert old.num_preemptions == 0
    assert [output.request_id for output in outputs][-1] == "young"
    assert young.output_token_ids == [1, 2, 5]
    assert scheduler.num_preemptions == 1


def test_a_preempted_request_comes_before_those_that_wait() -> None:
    scheduler = make_scheduler(num_blocks=5, session_len=16, max_prefill_token_num=64, enable_prefix_caching=False)
    add(scheduler, "old", range(10, 17), max_tokens=4)
    add(scheduler, "young", range(20, 27), max_tokens=8)
    for token_id in (1, 2):
        step(scheduler, token_id)
    add(scheduler, "new", range(30, 37))
    step(scheduler, 3)

    plan = step(scheduler, 4)[0]
    assert shape(plan) == [("old", 9, 10, True)]

    assert shape(step(scheduler, 5)[0])[0] == ("young", 0, 9, True)


def test_a_preempted_request_takes_its_published_blocks_back() -> None:
    scheduler = make_scheduler(num_blocks=5, session_len=16, max_prefill_token_num=64)
    add(scheduler, "old", range(10, 17), max_tokens=3)
    young = add(scheduler, "young", range(20, 27), max_tokens=8)
    for token_id in (1, 2, 3):
        step(scheduler, token_id)

    plan = step(scheduler)[0]

    assert shape(plan) == [("young", 8, 9, True)]
    assert young.num_cached == 0  # of the first admission


def test_the_key_that_holds_most_blocks_gives_back_though_another_is_younger() -> None:
    scheduler = make_scheduler(num_blocks=10, session_len=40, max_prefill_token_num=64, enable_prefix_caching=False)
    add(scheduler, "oldest", range(10, 21), tenant="a")
    larger = add(scheduler, "larger", range(40, 51), tenant="a")
    step(scheduler)
    add(scheduler, "other", range(70, 77), tenant="b")
    for token_id in (1, 2, 3):
        plan, _ = step(scheduler, token_id)

    while not scheduler.num_preemptions:
        plan, _ = step(scheduler)

    assert larger.num_preemptions == 1
    assert [chunk.request_id for chunk in plan.chunks] == ["oldest", "other"]


# Pictures


def test_a_chunk_stops_before_a_picture_that_is_not_ready_and_others_go_on() -> None:
    scheduler = make_scheduler(max_prefill_token_num=16)
    add(scheduler, "a", [1, 2], ("x", 3), [4])
    add(scheduler, "b", [5])

    assert shape(step(scheduler)[0]) == [("a", 0, 2, False), ("b", 0, 1, True)]
    assert shape(step(scheduler)[0]) == [("b", 1, 2, True)]
    scheduler.image_ready(b"x")
    plan = step(scheduler)[0]

    assert shape(plan) == [("b", 2, 3, True), ("a", 2, 6, True)]
    assert plan.chunks[1].image_pieces == (ImagePiece(b"x", 0, 0, 3),)


def test_rows_that_wait_for_their_pictures_are_no_load_of_prefill() -> None:
    """Running ones, which have come as far as a picture, and waiting ones, which begin with one."""
    scheduler = make_scheduler()
    add(scheduler, "decodes", [1, 2])
    step(scheduler)
    add(scheduler, "runs", [3, 4], ("cat", 4))
    add(scheduler, "waits", ("dog", 4), [5])
    loads = [scheduler.prefill_load()]
    step(scheduler)
    loads.append(scheduler.prefill_load())

    scheduler.image_ready(b"cat")
    loads.append(scheduler.prefill_load())

    assert loads == [(1, 2), (1, 0), (1, 1)]


def test_a_request_that_begins_with_a_missing_picture_is_not_admitted() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", ("x", 3), [4])
    add(scheduler, "b", [5])

    assert shape(step(scheduler)[0]) == [("b", 0, 1, True)]
    assert scheduler.num_waiting == 1


def test_who_awaits_a_picture_goes_on_with_an_earlier_one_whose_cached_blocks_are_gone() -> None:
    scheduler = make_scheduler(num_blocks=10, max_prefill_token_num=64)
    scheduler.image_ready(b"earlier")
    add(scheduler, "first", ("earlier", 8), [1], max_tokens=1)
    step(scheduler)
    add(scheduler, "waits", ("earlier", 8), ("later", 4), [1])
    assert shape(step(scheduler)[0]) == []
    scheduler.image_forgotten(b"earlier")
    add(scheduler, "evicts", range(10, 49), max_tokens=1)
    step(scheduler)

    scheduler.image_ready(b"earlier")

    assert shape(step(scheduler)[0]) == [("waits", 0, 8, False)]


def test_who_awaits_a_picture_goes_on_when_another_request_has_it_in_the_prefix_cache() -> None:
    """The picture was forgotten when the block with its end was only half full; what fills it is the first turn's answer."""
    scheduler = make_scheduler()
    scheduler.image_ready(b"x")
    add(scheduler, "first turn", [1, 2, 3], ("x", 3), max_tokens=20)
    step(scheduler, 7)
    scheduler.image_forgotten(b"x")
    add(scheduler, "second turn", [1, 2, 3], ("x", 3), [7, 7, 9], max_tokens=1)
    step(scheduler, 7)
    assert [image.content_hash for image in scheduler.images_needed()] == [b"x"]

    while scheduler.images_needed():  # the encoder is busy
        step(scheduler, 7)
    _, outputs = step(scheduler, 7)

    assert [output.request_id for output in outputs if output.finish_reason] == ["second turn"]


def test_held_requests_keep_no_picture_behind_them_from_being_needed() -> None:
    scheduler = make_scheduler()
    for number in range(scheduler.config.max_batch_size):
        add(scheduler, f"held {number}", [number, 2, 3])
        scheduler.hold(f"held {number}")
    add(scheduler, "held last", ("x", 1), [1])
    scheduler.hold("held last")
    add(scheduler, "free", ("y", 1), [1])

    assert [image.content_hash for image in scheduler.images_needed()] == [b"y"]


def test_who_lacked_blocks_and_awaits_a_picture_now_lets_small_prompts_pass() -> None:
    scheduler = make_scheduler(30, session_len=100, max_prefill_token_num=4, enable_prefix_caching=False)
    scheduler.image_ready(b"x")
    add(scheduler, "large", [1] * 80, max_tokens=1)
    add(scheduler, "short of blocks", ("x", 8), [2] * 40, max_tokens=1)
    step(scheduler)
    step(scheduler)
    scheduler.image_forgotten(b"x")
    while "large" in scheduler.requests:
        step(scheduler)
    add(scheduler, "long", [3] * 40, max_tokens=1)
    step(scheduler)
    add(scheduler, "small", [4] * 3, max_tokens=1)

    ended = [output.request_id for _ in range(2) for output in step(scheduler)[1]]

    assert ended == ["small"]


def test_a_long_picture_is_split_by_the_budget_and_its_pieces_follow() -> None:
    scheduler = make_scheduler(max_prefill_token_num=4)
    add(scheduler, "a", [1], ("x", 6), ("y", 2), [2])
    scheduler.image_ready(b"x")
    scheduler.image_ready(b"y")

    pieces = [step(scheduler)[0].chunks[0].image_pieces for _ in range(3)]

    assert pieces == [
        (ImagePiece(b"x", 1, 0, 3),),
        (ImagePiece(b"x", 0, 3, 3), ImagePiece(b"y", 3, 0, 1)),
        (ImagePiece(b"y", 0, 1, 1),),
    ]


def test_a_span_may_begin_at_any_row_of_its_picture() -> None:
    prompt = Prompt(
        token_ids=(9, 9, 1, 9),
        cache_keys=(-1, -2, 1, -3),
        images=(ImageInput(b"x", 3, {}),),
        spans=(ImageSpan(0, 2, 0), ImageSpan(3, 1, 0, offset=2)),
    )
    scheduler = make_scheduler()
    scheduler.add(Request("a", prompt, SamplingParams()))
    scheduler.image_ready(b"x")

    assert step(scheduler)[0].chunks[0].image_pieces == (ImagePiece(b"x", 0, 0, 2), ImagePiece(b"x", 3, 2, 1))


def test_an_atomic_picture_is_never_split() -> None:
    scheduler = make_scheduler(max_prefill_token_num=4)
    add(scheduler, "a", [1, 2], ("x", 3, True), [3], ("y", 6, True), [4])
    scheduler.image_ready(b"x")
    scheduler.image_ready(b"y")

    assert [shape(step(scheduler)[0])[0][1:3] for _ in range(4)] == [(0, 2), (2, 6), (6, 12), (12, 13)]


def test_an_atomic_picture_waits_for_an_unspent_budget_and_nobody_passes_it() -> None:
    scheduler = make_scheduler(max_prefill_token_num=4)
    add(scheduler, "a", [1, 2, 3])
    add(scheduler, "b", ("x", 4, True), [1])
    add(scheduler, "c", [7])
    scheduler.image_ready(b"x")

    plans = [shape(step(scheduler)[0]) for _ in range(3)]

    assert plans[0] == [("a", 0, 3, True)]
    assert plans[1] == [("a", 3, 4, True), ("b", 0, 4, False)]
    assert plans[2][1:] == [("b", 4, 5, True), ("c", 0, 1, True)]


def test_a_cached_prefix_that_ends_inside_an_atomic_picture_is_cut_before_it() -> None:
    scheduler = make_scheduler(max_prefill_token_num=64)
    parts = ([1, 2, 3, 4, 5], ("x", 6, True))
    scheduler.image_ready(b"x")
    add(scheduler, "a", *parts, [7], max_tokens=1)
    run_out(scheduler)

    request = add(scheduler, "b", *parts, [8])
    plan = step(scheduler)[0]

    assert shape(plan) == [("b", 4, 12, True)]  # two blocks are cached, the second ends at slot 8, inside the picture
    assert plan.chunks[0].image_pieces == (ImagePiece(b"x", 1, 0, 6, True),)
    assert request.num_cached == 4


def test_pictures_in_the_prefix_cache_are_not_needed_again() -> None:
    scheduler = make_scheduler(max_prefill_token_num=64)
    add(scheduler, "a", ("x", 8), [1], max_tokens=1)
    scheduler.image_ready(b"x")
    run_out(scheduler)
    scheduler.image_forgotten(b"x")

    add(scheduler, "b", ("x", 8), [2])

    assert scheduler.images_needed() == []
    assert shape(step(scheduler)[0]) == [("b", 8, 9, True)]


def test_different_pictures_under_equal_tokens_share_nothing() -> None:
    scheduler = make_scheduler(max_prefill_token_num=64)
    for name in ("x", "y"):
        scheduler.image_ready(name.encode())
        add(scheduler, name, [1, 2, 3, 4], (name, 8), [2], max_tokens=1)
    outputs = run_out(scheduler)

    assert {output.request_id: output.num_cached_tokens for output in outputs} == {"x": 0, "y": 4}


def test_pictures_are_needed_in_order_of_need_and_each_once() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    add(scheduler, "a", [1], ("x", 1), ("y", 1))
    add(scheduler, "b", ("z", 1), ("x", 1), [1])
    step(scheduler)

    def needed() -> list[bytes]:
        return [image.content_hash for image in scheduler.images_needed()]

    assert needed() == [b"x", b"y", b"z"]
    scheduler.image_ready(b"x")
    assert needed() == [b"y", b"z"]
    scheduler.abort("a")
    scheduler.image_forgotten(b"x")
    assert needed() == [b"z", b"x"]


def test_the_look_ahead_for_pictures_is_bounded() -> None:
    scheduler = make_scheduler(max_batch_size=64)
    for index in range(MAX_IMAGES_AHEAD):
        add(scheduler, str(index), (f"{index}", 1), (f"also {index}", 1), [1])

    assert len(scheduler.images_needed()) == MAX_IMAGES_AHEAD


def test_without_looking_ahead_only_each_tenants_first_request_with_pictures_has_them_encoded() -> None:
    scheduler = make_scheduler(max_batch_size=4)
    add(scheduler, "a0", [1], tenant="a")
    add(scheduler, "a1", ("x", 2), [1], tenant="a")
    add(scheduler, "a2", ("y", 2), [1], tenant="a")
    add(scheduler, "b", ("z", 2), ("x", 2), [1], tenant="b")
    for request_id in ("a0", "a1", "a2", "b"):
        scheduler.hold(request_id)

    def needed(*, ahead: bool) -> set[bytes]:
        return {image.content_hash for image in scheduler.images_needed(ahead=ahead)}

    assert (needed(ahead=True), needed(ahead=False)) == ({b"x", b"y", b"z"}, {b"x", b"z"})
    scheduler.image_ready(b"x")
    assert needed(ahead=False) == {b"z"}
    scheduler.release("a1")
    scheduler.schedule()
    assert needed(ahead=False) == {b"y", b"z"}


def test_ready_pictures_of_requests_are_pinned_until_they_are_computed() -> None:
    scheduler = make_scheduler(max_prefill_token_num=2)
    for name in (b"x", b"y"):
        scheduler.image_ready(name)
    add(scheduler, "a", [1], ("x", 2), [1])
    add(scheduler, "b", ("y", 2), [1])
    assert scheduler.pinned_images() == {b"x", b"y"}

    pinned = []
    for _ in range(4):
        plan = scheduler.schedule()
        pinned.append(scheduler.pinned_images())
        scheduler.commit(plan, {chunk.request_id: SampledToken(5) for chunk in plan.chunks if chunk.samples})

    assert pinned == [{b"x", b"y"}, {b"x", b"y"}, {b"y"}, set()]


def test_a_waiting_request_pins_no_picture_that_the_prefix_cache_has_or_that_it_left() -> None:
    scheduler = make_scheduler(max_prefill_token_num=64)
    for name in (b"x", b"y"):
        scheduler.image_ready(name)
    add(scheduler, "first", ("x", 4), [1], max_tokens=1)
    step(scheduler)

    add(scheduler, "again", ("x", 4), ("y", 4), [1])
    assert scheduler.pinned_images() == {b"y"}
    scheduler.abort("again")
    assert scheduler.pinned_images() == set()


def test_requests_that_still_need_a_picture_are_known() -> None:
    scheduler = make_scheduler(max_prefill_token_num=64)
    scheduler.image_ready(b"x")
    add(scheduler, "done", ("x", 1), [1])
    step(scheduler)
    add(scheduler, "waits", [1], ("x", 1), [1])
    add(scheduler, "other", [1], ("y", 1), [1])

    assert scheduler.requests_with_image(b"x") == ["waits"]


# Everything at once


def scripted_token(keys: Sequence[int]) -> int:
    """What the model says after these keys; an end token once in 29 times."""
    return zlib.crc32(repr(tuple(keys)).encode()) % 29


def answer_alone(request: Request, session_len: int) -> list[int]:
    keys = list(request.prompt.cache_keys)
    tokens: list[int] = []
    while len(keys) < session_len and len(tokens) < (request.params.max_tokens or session_len):
        tokens.append(scripted_token(keys))
        keys.append(tokens[-1])
        if tokens[-1] == EOS:
            break
    return tokens


class ScriptedRunner:
    """Executes plans on a cache that holds, for each slot of each block, all keys up to it; checks what a real runner relies on."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.block_size = scheduler.config.cache_block_seq_len
        self.contents: dict[tuple[int, int], tuple[int, ...]] = {}
        self.embeddings: set[bytes] = set()

    def execute(self, plan: Plan) -> dict[str, SampledToken]:
        ids = [chunk.request_id for chunk in plan.chunks]
        assert len(set(ids)) == len(ids) <= self.scheduler.config.max_batch_size
        self.check_budget(plan)
        for source, target in plan.block_copies:
            for offset in range(self.block_size):
                self.contents[target, offset] = self.contents.get((source, offset), ())
        written = [place for chunk in plan.chunks for place in self.write(chunk)]
        assert len(set(written)) == len(written), "two rows write one slot"
        return {chunk.request_id: self.read(chunk) for chunk in plan.chunks if chunk.samples}

    def check_budget(self, plan: Plan) -> None:
        budget, prefills = self.scheduler.config.max_prefill_token_num, []
        for chunk in plan.chunks:
            request = self.scheduler.requests[chunk.request_id]
            if chunk.start < request.num_prompt_tokens or len(chunk.token_ids) > 1 or not chunk.samples:
                prefills.append(chunk)
        if sum(len(chunk.token_ids) for chunk in prefills) > budget:
            assert len(prefills) == 1, "more than one row where the budget is exceeded"
            spans = self.scheduler.requests[prefills[0].request_id].prompt.spans
            end = prefills[0].start + len(prefills[0].token_ids)
            assert any(span.is_atomic and (span.start, span.start + span.num_tokens) == (prefills[0].start, end) for span in spans)

    def write(self, chunk: Chunk) -> list[tuple[int, int]]:
        request = self.scheduler.requests[chunk.request_id]
        start, end = chunk.start, chunk.start + len(chunk.token_ids)
        assert start == request.num_computed
        assert end > start
        assert chunk.token_ids == request.token_ids[start:end]
        assert chunk.samples == (end == len(request.token_ids))
        assert len(chunk.block_ids) == -(-end // self.block_size)
        self.check_images(request, chunk)
        places = [(chunk.block_ids[slot // self.block_size], slot % self.block_size) for slot in range(start, end)]
        for slot, place in enumerate(places, start):
            self.contents[place] = tuple(request.cache_keys[: slot + 1])
        return places

    def check_images(self, request: Request, chunk: Chunk) -> None:
        """Every image slot of the chunk gets its own row of a ready embedding, and no other slot does."""
        start, end = chunk.start, chunk.start + len(chunk.token_ids)
        expected = {}
        for span in request.prompt.spans:
            inside = [slot for slot in range(span.start, span.start + span.num_tokens) if start <= slot < end]
            assert not (span.is_atomic and inside) or len(inside) == span.num_tokens, "an atomic span is split"
            content_hash = request.prompt.images[span.image].content_hash
            expected |= {slot - start: (content_hash, span.offset + slot - span.start) for slot in inside}
        given = {
            piece.row + row: (piece.content_hash, piece.offset + row) for piece in chunk.image_pieces for row in range(piece.num_tokens)
        }
        assert given == expected
        assert {content_hash for content_hash, _ in given.values()} <= self.embeddings

    def read(self, chunk: Chunk) -> SampledToken:
        request = self.scheduler.requests[chunk.request_id]
        for slot in range(len(request.token_ids)):
            place = chunk.block_ids[slot // self.block_size], slot % self.block_size
            assert self.contents[place] == tuple(request.cache_keys[: slot + 1]), "a row reads another's slots"
        return SampledToken(scripted_token(request.cache_keys))


TEXTS = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=6)
PICTURES = st.tuples(st.sampled_from(["x", "y", "z"]), st.sampled_from([1, 5, 9]), st.booleans())


class Engine(RuleBasedStateMachine):
    """Random arrivals, aborts, pictures that come and go, and steps, with few blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: dict[str, Request] = {}
        self.answers: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.set_up(10, True)

    def set_up(self, num_blocks: int, prefix: bool) -> None:
        config = make_config(max_batch_size=3, max_prefill_token_num=6, session_len=40, enable_prefix_caching=prefix)
        self.scheduler = Scheduler(config, num_blocks=num_blocks, eos_token_ids=(EOS,))
        self.runner = ScriptedRunner(self.scheduler)

    @precondition(lambda self: not self.requests)
    @rule(num_blocks=st.integers(10, 16), prefix=st.booleans())
    def choose(self, num_blocks: int, prefix: bool) -> None:
        self.set_up(num_blocks, prefix)

    @rule(
        parts=st.lists(st.one_of(TEXTS, PICTURES), min_size=1, max_size=4),
        max_tokens=st.integers(1, 24),
        copies=st.integers(1, 3),
        tenant=st.sampled_from(["", "a", "b", "c"]),
    )
    def add(self, parts: list[Any], max_tokens: int, copies: int, tenant: str) -> None:
        for _ in range(copies):
            request_id = str(len(self.requests))
            request = make_request(request_id, *parts, max_tokens=max_tokens, tenant=tenant)
            if request.num_prompt_tokens < 40:
                self.scheduler.add(request)
                self.requests[request_id] = request
                self.answers[request_id] = []

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data(), is_failure=st.booleans())
    def end(self, data: st.DataObject, is_failure: bool) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
        output = self.scheduler.fail(request_id, "broken") if is_failure else self.scheduler.abort(request_id)
        assert output is not None
        self.deliver([output])

    @rule(data=st.data())
    def encode(self, data: st.DataObject) -> None:
        needed = [image.content_hash for image in self.scheduler.images_needed()]
        assert not self.runner.embeddings & set(needed)
        if needed:
            self.encoded(data.draw(st.sampled_from(needed)))

    def encoded(self, content_hash: bytes) -> None:
        self.runner.embeddings.add(content_hash)
        self.scheduler.image_ready(content_hash)

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        forgettable = sorted(self.runner.embeddings - self.scheduler.pinned_images())
        if forgettable:
            content_hash = data.draw(st.sampled_from(forgettable))
            self.runner.embeddings.discard(content_hash)
            self.scheduler.image_forgotten(content_hash)

    @rule()
    def step(self) -> None:
        plan = self.scheduler.schedule()
        self.deliver(self.scheduler.commit(plan, self.runner.execute(plan)))

    @rule(data=st.data())
    def step_during_which_one_is_aborted(self, data: st.DataObject) -> None:
        plan = self.scheduler.schedule()
        sampled = self.runner.execute(plan)
        if self.scheduler.requests:
            output = self.scheduler.abort(data.draw(st.sampled_from(sorted(self.scheduler.requests))))
            assert output is not None
            self.deliver([output])
        self.scheduler.check()
        self.deliver(self.scheduler.commit(plan, sampled))

    def deliver(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            assert output.request_id not in self.reasons, "an output after the last one"
            self.answers[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                self.reasons[output.request_id] = output.finish_reason

    @invariant()
    def everything_agrees(self) -> None:
        self.scheduler.check()
        assert set(self.requests) - set(self.reasons) == set(self.scheduler.requests)

    @invariant()
    def answers_are_those_of_a_request_alone(self) -> None:
        for request_id, answer in self.answers.items():
            alone = answer_alone(self.requests[request_id], 40)
            assert answer == alone[: len(answer)]
            if self.reasons.get(request_id) in (FinishReason.STOP, FinishReason.LENGTH):
                assert answer == alone

    def teardown(self) -> None:
        """Everyone ends soon, with an embedding cache that is full as soon as anything in it is pinned."""
        num_slots = sum(len(request.prompt.token_ids) + 24 for request in self.scheduler.requests.values())
        for _ in range(10 * num_slots):
            if not self.scheduler.has_work:
                break
            for content_hash in sorted(self.runner.embeddings - self.scheduler.pinned_images()):
                self.runner.embeddings.discard(content_hash)
                self.scheduler.image_forgotten(content_hash)
            for image in self.scheduler.images_needed(ahead=not self.runner.embeddings)[:1]:
                self.encoded(image.content_hash)
            self.step()
            self.scheduler.check()
        assert not self.scheduler.has_work, f"never ended: {self.scheduler.requests}"
        self.answers_are_those_of_a_request_alone()
        assert self.scheduler.blocks.num_referenced == 0


TestEngine = Engine.TestCase
TestEngine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("tenants", [("", ""), ("a", "b")])
def test_a_request_that_lacked_rows_is_forgotten_with_its_pictures_when_it_ends(tenants: tuple[str, str]) -> None:
    scheduler = make_scheduler(max_batch_size=1)
    add(scheduler, "runs", range(1, 5), tenant=tenants[0])
    scheduler.schedule()
    image = weakref.ref(add(scheduler, "short", range(5, 9), ("a picture", 2), tenant=tenants[1]).prompt.images[0])
    scheduler.schedule()
    scheduler.schedule()
    assert image() is not None

    scheduler.abort("short")
    scheduler.abort("runs")

    gc.collect()
    assert image() is None
