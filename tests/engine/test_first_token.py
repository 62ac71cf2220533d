"""The clock until the first token: its stages add up, whatever happens and in whichever order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.first_token import FirstTokenClock


class Clock:
    """Moves on only when told to."""

    def __init__(self) -> None:
        self.time_s = 0.0

    def __call__(self) -> float:
        return self.time_s


def test_the_stages_are_the_queue_the_encoder_and_the_rest() -> None:
    now = Clock()
    clock = FirstTokenClock(now)
    for time_s, event in ((0, clock.added), (1, clock.begun), (3, clock.encoded), (4, clock.begun), (6, clock.encoded)):
        now.time_s = time_s
        event("request")
    now.time_s = 10

    assert clock.ended("request") == {"queue": 1, "encode": 5, "prefill": 4}
    assert clock.ended("request") is None


def test_without_a_picture_to_encode_there_is_no_such_stage() -> None:
    clock = FirstTokenClock(Clock())
    clock.added("request")
    clock.begun("request")

    assert clock.ended("request") == {"queue": 0, "prefill": 0}


def test_what_is_told_of_requests_that_have_ended_is_ignored() -> None:
    clock = FirstTokenClock(Clock())
    for event in (clock.begun, clock.encoded):
        event("gone")

    assert len(clock) == 0
    assert clock.ended("gone") is None


def test_the_oldest_request_is_the_first_that_has_not_begun() -> None:
    now = Clock()
    clock = FirstTokenClock(now)
    for time_s, name in ((0, "begun"), (1, "waits"), (4, "waits too")):
        now.time_s = time_s
        clock.added(name)
    clock.begun("begun")
    now.time_s = 10

    assert clock.oldest_waiting_s() == 9
    assert clock.oldest_s(["waits too", "gone"]) == 6
    clock.ended("waits")
    clock.ended("waits too")
    assert (clock.oldest_waiting_s(), clock.oldest_s(["gone"])) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from(["begun", "encoded"]), st.floats(0, 100)), max_size=8), st.floats(0, 100))
def test_the_stages_add_up_to_the_whole_time(events: list[tuple[str, float]], last_s: float) -> None:
    now = Clock()
    clock = FirstTokenClock(now)
    clock.added("request")
    for name, wait_s in [("begun", 0.0), *events] if events else []:
        now.time_s += wait_s
        getattr(clock, name)("request")
    now.time_s += last_s

    stages = clock.ended("request")

    assert stages is not None
    assert sum(stages.values()) == pytest.approx(now.time_s)
    assert min(stages.values()) >= 0
