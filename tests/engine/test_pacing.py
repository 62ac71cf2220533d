import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.pacing import MIN_ENCODE_S, MIN_PREFILL_TOKENS, Pace

MAX_TOKENS = 512
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
    assert measured(share).prefill_tokens(num_decoding=8, num_prefilling=1) == pytest.approx(num_tokens, rel=0.1)


def test_prefill_takes_more_where_more_rows_wait_than_decode():
    pace = measured()
    allowed_s = 3 * (STEP_S + 2 * ROW_S)

    assert pace.prefill_tokens(num_decoding=2, num_prefilling=6) == pytest.approx(allowed_s / TOKEN_S, rel=0.1)


def test_pictures_have_what_prefill_leaves_of_the_share():
    pace = measured()

    assert pace.encode_s(num_decoding=8, num_prefill_tokens=0) == pytest.approx(DECODE_8_S, rel=0.1)
    assert pace.encode_s(num_decoding=8, num_prefill_tokens=30) == pytest.approx(DECODE_8_S - 30 * TOKEN_S, rel=0.2, abs=0.002)


def test_what_steps_cost_is_known_where_every_step_has_prefill():
    pace = measured()

    for _ in range(100):
        step(pace, num_decoding=32, num_prefill_tokens=40)

    decode_s = STEP_S + 32 * ROW_S
    assert pace.prefill_tokens(num_decoding=32, num_prefilling=1) >= decode_s / TOKEN_S / 2


def test_a_machine_that_becomes_slower_is_noticed():
    pace = measured()

    for number in range(64):
        num_tokens = (0, 0, 100, 30)[number % 4]
        pace.stepped(3 * (DECODE_8_S + TOKEN_S * num_tokens), num_decoding=8, num_prefill_tokens=num_tokens)

    assert pace.encode_s(num_decoding=8, num_prefill_tokens=0) == pytest.approx(3 * DECODE_8_S, rel=0.1)


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
        assert pace.encode_s(num_decoding=num_decoding, num_prefill_tokens=num_tokens) >= MIN_ENCODE_S
