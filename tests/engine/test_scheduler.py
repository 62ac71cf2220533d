"""The scheduler by example, with requests of text; those with pictures are in a file of their own."""

from typing import Any

import pytest

from engine.request import (
    FinishReason,
    ImageInput,
    ImageSpan,
    InvalidRequestError,
    Prompt,
    PromptTooLongError,
    QueueFullError,
    Request,
    SampledToken,
    SamplingParams,
    StepOutput,
    TokenLogprobs,
)
from tests.engine.scheduling import EOS, add, make_scheduler, run_out, shape, step

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
