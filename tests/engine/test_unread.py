"""Outputs that nobody reads: bounded per request and together, and never lost to those who do read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.request import EngineDeadError, FinishReason, StepOutput, TokenLogprobs, UnreadError
from engine.unread import OutputQueue, UnreadOutputs, size_of

SCORED = TokenLogprobs(token_id=1, logprob=-1.0, rank=1, top=((1, -1.0), (2, -2.0)))


def token(request_id: str = "a", number: int = 0, **fields: object) -> StepOutput:
    return StepOutput(request_id=request_id, token_ids=[number], **fields)  # type: ignore[arg-type]


async def all_of(queue: OutputQueue) -> tuple[list[int], type[Exception] | None]:
    """The tokens that are read, and what ended them."""
    read: list[int] = []
    try:
        while True:
            output = await queue.get()
            read += output.token_ids
            if output.finish_reason is not None:
                return read, None
    except (UnreadError, EngineDeadError) as error:
        return read, type(error)


async def test_what_was_written_before_the_reader_was_given_up_can_still_be_read():
    outputs = UnreadOutputs(limit_bytes=3 * size_of(token()))
    queue = outputs.open("a")

    taken = [outputs.put(token(number=number)) for number in range(8)]

    assert taken == [True] * 4 + [False] + [True] * 3  # told once, then dropped
    assert await all_of(queue) == ([0, 1, 2, 3], UnreadError)
    assert queue.num_bytes == outputs.num_bytes == 0


async def test_a_reader_who_keeps_up_is_never_given_up():
    outputs = UnreadOutputs(limit_bytes=size_of(token()), limit_bytes_together=1)
    queue = outputs.open("a")

    for number in range(1000):
        assert outputs.put(token(number=number))
        assert (await queue.get()).token_ids == [number]


async def test_one_output_may_be_larger_than_the_limit():
    outputs = UnreadOutputs(limit_bytes=100)
    queue = outputs.open("a")

    assert outputs.put(token(prompt_logprobs=[SCORED] * 100))
    assert outputs.put(token(finish_reason=FinishReason.STOP))

    assert await all_of(queue) == ([0, 0], None)


async def test_together_too_much_ends_who_has_more_than_a_share():
    outputs = UnreadOutputs(limit_bytes_together=10 * size_of(token()))
    slow, slower = outputs.open("slow"), outputs.open("slower")
    for number in range(9):
        assert outputs.put(token("slower", number))
    assert outputs.put(token("slow", 0))
    assert outputs.put(token("slow", 1))

    assert not outputs.put(token("slower", 9))
    assert outputs.put(token("slow", 2))

    assert slower.is_ended
    assert not slow.is_ended


async def test_what_comes_for_a_request_that_is_gone_is_dropped():
    outputs = UnreadOutputs()
    outputs.open("a")
    outputs.put(token())
    outputs.close("a")

    assert outputs.put(token())
    outputs.fail("a", EngineDeadError("gone"))
    outputs.fail_all(EngineDeadError("gone"))

    assert (len(outputs), outputs.num_bytes) == (0, 0)


async def test_the_first_error_is_the_one_that_is_told():
    outputs = UnreadOutputs(limit_bytes=1)
    queue = outputs.open("a")
    outputs.put(token())
    outputs.put(token())

    outputs.fail_all(EngineDeadError("the engine process ended"))

    assert await all_of(queue) == ([0], UnreadError)


@pytest.mark.parametrize("num_top", [0, 5, 20])
def test_log_probabilities_weigh_what_they_take(num_top: int):
    scored = TokenLogprobs(token_id=1, logprob=-1.0, rank=1, top=tuple((index, -1.0) for index in range(num_top)))

    assert size_of(token(logprobs=[scored])) - size_of(token()) == 200 + 116 * num_top


STEPS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["put", "read", "close", "open", "fail"]), st.integers(0, 4)), max_size=80
)


@given(STEPS)
async def test_the_bytes_are_those_of_what_is_queued_and_within_the_limit(steps):
    """Whatever readers do and in whatever order: at most one output beyond the limit each, and nothing stays behind."""
    limit = 4 * size_of(token())
    outputs = UnreadOutputs(limit_bytes=limit)
    queues: dict[str, OutputQueue] = {}
    for name, what, count in steps:
        if what == "open" and name not in outputs:
            queues[name] = outputs.open(name)
        elif what == "close" and name in outputs:
            outputs.close(name)
            del queues[name]
        elif what == "fail":
            outputs.fail(name, EngineDeadError("ended"))
        elif what == "put":
            for _ in range(count):
                outputs.put(token(name))
        elif what == "read" and name in queues and queues[name].num_bytes:
            await queues[name].get()

        assert outputs.num_bytes == sum(queue.num_bytes for queue in queues.values())
        assert all(0 <= queue.num_bytes <= limit + size_of(token()) for queue in queues.values())

    for name in queues:
        outputs.close(name)
    assert outputs.num_bytes == 0
