import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.pacing import MIN_ENCODE_S, MIN_PREFILL_TOKENS, Pace

MAX_TOKENS = 512
MANY = 3  # of those who wait: with them, others have all of their share
STEP_S, ROW_S, TOKEN_S = 0.020, 0.0025, 0.001
DECODE_8_S = STEP_S + 8 * ROW_S


def step(pace: Pace, num_decoding: int, num_prefill_tokens: int) -> None:
    step_s = STEP_S + ROW_S * num_decoding + TOKEN_S * num_prefill_tokens
    pace.stepped(step_s, num_decoding=num_decoding, num_prefill_tokens=num_prefill_tokens)


def measured(share: float = 0.5) -> Pace:
    """A pace that has seen steps of several kinds on a machine whose times are exactly those above."""
    pace = Pace(share, max_prefill_tokens=MAX_TOKENS)
    for number in range(64):
        step(pace, num_decoding=1 + number % 16, num_prefill_tokens=(0, 0, 100, 30)[number % 4])
    return pace


def test_nothing_holds_prefill_back_where_no_row_decodes():
    assert measured().prefill_tokens(num_decoding=0, num_prefilling=3) == MAX_TOKENS


def test_what_was_not_measured_holds_nothing_back():
    assert Pace(0.5, max_prefill_tokens=MAX_TOKENS).prefill_tokens(num_decoding=8, num_prefilling=1) == MAX_TOKENS


@pytest.mark.parametrize(("share", "num_tokens"), [(0.5, 40), (0.6, 60), (0.01, MIN_PREFILL_TOKENS), (0.99, MAX_TOKENS)])
def test_prefill_takes_its_share_of_the_time_beside_decoding_rows(share, num_tokens):
    assert measured(share).prefill_tokens(num_decoding=8, num_prefilling=MANY) == pytest.approx(num_tokens, rel=0.1)


def test_pictures_that_want_their_time_leave_prefill_half_of_it():
    assert measured().prefill_tokens(num_decoding=32, num_prefilling=1, num_images=MANY) == pytest.approx(50, rel=0.1)


def test_what_a_prompt_costs_is_still_known_after_a_long_time_without_one():
    pace = measured()

    for number in range(1000):
        step(pace, num_decoding=8 + number % 2, num_prefill_tokens=0)

    assert pace.prefill_tokens(num_decoding=8, num_prefilling=MANY) == pytest.approx(40, rel=0.1)


def test_steps_that_something_held_up_do_not_count_as_what_steps_take():
    pace = measured()

    for number in range(48):
        held_up_s = 0.1 if number % 5 == 0 else 0.0
        pace.stepped(DECODE_8_S + held_up_s, num_decoding=8, num_prefill_tokens=0)

    assert pace.encode_s(DECODE_8_S, num_decoding=8, num_prefilling=1, num_images=MANY) == pytest.approx(DECODE_8_S, rel=0.1)


def test_prefill_takes_more_where_more_rows_wait_than_decode():
    pace = measured()
    allowed_s = 3 * (STEP_S + 2 * ROW_S)

    assert pace.prefill_tokens(num_decoding=2, num_prefilling=6) == pytest.approx(allowed_s / TOKEN_S, rel=0.1)


@pytest.mark.parametrize(("share", "wait_s"), [(0.5, 2 * DECODE_8_S), (0.6, 2.5 * DECODE_8_S)])
@pytest.mark.parametrize("step_s", [DECODE_8_S, 1.5 * DECODE_8_S, DECODE_8_S + 30 * TOKEN_S])
def test_a_step_and_the_pictures_after_it_take_the_same_time_however_long_the_step_took(share, wait_s, step_s):
    assert step_s + measured(share).encode_s(step_s, num_decoding=8, num_prefilling=0, num_images=MANY) == pytest.approx(wait_s, rel=0.1)


def test_fewer_who_wait_take_less_so_that_their_work_is_spread():
    pace = measured()
    encode_s = [pace.encode_s(DECODE_8_S, num_decoding=8, num_prefilling=0, num_images=number) for number in (1, 2, 3, 40)]

    assert encode_s == pytest.approx([0.6 * DECODE_8_S, 0.8 * DECODE_8_S, DECODE_8_S, DECODE_8_S], rel=0.15)
    assert pace.prefill_tokens(num_decoding=8, num_prefilling=1) < pace.prefill_tokens(num_decoding=8, num_prefilling=3)


def test_a_picture_gets_on_after_the_longest_step():
    assert measured().encode_s(100.0, num_decoding=8, num_prefilling=0, num_images=1) == MIN_ENCODE_S


def test_what_steps_cost_is_known_where_every_step_has_prefill():
    pace = measured()

    for _ in range(100):
        step(pace, num_decoding=32, num_prefill_tokens=40)

    decode_s = STEP_S + 32 * ROW_S
    assert pace.prefill_tokens(num_decoding=32, num_prefilling=1) >= decode_s / TOKEN_S / 2


def test_a_machine_that_becomes_slower_is_noticed():
    pace = measured()

    for number in range(128):
        num_tokens = (0, 0, 100, 30)[number % 4]
        pace.stepped(3 * (DECODE_8_S + TOKEN_S * num_tokens), num_decoding=8, num_prefill_tokens=num_tokens)

    assert pace.encode_s(3 * DECODE_8_S, num_decoding=8, num_prefilling=0, num_images=MANY) == pytest.approx(3 * DECODE_8_S, rel=0.1)


@given(
    st.floats(0.05, 0.95),
    st.lists(st.tuples(st.floats(0.0, 1), st.integers(0, 8), st.integers(0, MAX_TOKENS)), max_size=40),
    st.integers(0, 64),
    st.integers(0, 64),
)
def test_every_request_gets_on_whatever_was_measured(share, steps, num_decoding, num_prefilling):
    pace = Pace(share, max_prefill_tokens=MAX_TOKENS)

    for step_s, num_rows, num_tokens in steps:
        pace.stepped(step_s, num_decoding=num_rows, num_prefill_tokens=num_tokens)

        assert MIN_PREFILL_TOKENS <= pace.prefill_tokens(num_decoding=num_decoding, num_prefilling=num_prefilling) <= MAX_TOKENS
        assert pace.encode_s(step_s, num_decoding=num_decoding, num_prefilling=num_prefilling, num_images=2) >= MIN_ENCODE_S
