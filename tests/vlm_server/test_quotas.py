"""Buckets of a minute's worth: how much comes through in any time, and when the next may come."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vlm_server.fake_clock import NS_PER_S, FakeClock
from vlm_server.quotas import PIXELS, REQUESTS, TOKENS, Bucket, Limits, Quota, QuotaExceededError

MINUTE_NS = 60 * NS_PER_S

GAPS_NS = st.one_of(st.integers(0, 5), st.integers(0, 3 * MINUTE_NS))
PER_MINUTE = st.one_of(st.integers(1, 5), st.integers(1, 10**9))


def quota(clock: FakeClock, **limits: int) -> Quota:
    return Quota(Limits(**limits), owner="alice", clock_ns=clock)


def is_admitted(quota: Quota, *kinds: str) -> bool:
    try:
        quota.admit(*kinds)
    except QuotaExceededError:
        return False
    return True


@given(per_minute=PER_MINUTE, steps=st.lists(st.tuples(GAPS_NS, st.booleans()), max_size=60))
def test_no_window_lets_more_through_than_a_minutes_worth_and_what_came_in_meanwhile(
    per_minute: int, steps: list[tuple[int, bool]]
) -> None:
    clock = FakeClock()
    limited = quota(clock, requests=min(per_minute, 20))
    events: list[tuple[int, int]] = []  # when, and +1 for an admitted request, -1 for one that is not counted after all
    for gap_ns, is_refunded in steps:
        clock.advance(ns=gap_ns)
        if is_admitted(limited, REQUESTS):
            limited.take(REQUESTS, 1)
            events.append((clock.now_ns, 1))
            if is_refunded:
                limited.give_back(REQUESTS, 1)
                events.append((clock.now_ns, -1))

    for first, (start_ns, _) in enumerate(events):
        num_counted = 0
        for now_ns, change in events[first:]:
            num_counted += change
            assert num_counted * MINUTE_NS <= min(per_minute, 20) * (MINUTE_NS + now_ns - start_ns)


@given(
    per_minute=PER_MINUTE,
    steps=st.lists(st.tuples(GAPS_NS, st.sampled_from(["take", "give back"]), st.integers(0, 10**9)), max_size=40),
)
def test_a_bucket_is_exact(per_minute: int, steps: list[tuple[int, str, int]]) -> None:
    bucket, level, now_ns = Bucket(per_minute, 0), Fraction(per_minute), 0
    for gap_ns, action, amount in steps:
        now_ns += gap_ns
        level = min(Fraction(per_minute), level + Fraction(per_minute * gap_ns, MINUTE_NS))
        if action == "take":
            bucket.take(amount, now_ns)
            level -= amount
        else:
            bucket.give_back(amount, now_ns)
            level = min(Fraction(per_minute), level + amount)

        assert bucket.standing(now_ns).remaining == max(0, level // 1)
        wait_ns = bucket.wait_ns(1, now_ns)
        assert (wait_ns == 0) == (level >= 1)
        if wait_ns:
            assert level + Fraction(per_minute * (wait_ns - 1), MINUTE_NS) < 1 <= level + Fraction(per_minute * wait_ns, MINUTE_NS)


@given(per_minute=PER_MINUTE, used=st.integers(0, 10**10), kind=st.sampled_from([TOKENS, PIXELS]))
def test_after_the_stated_wait_and_not_a_second_before_the_next_is_admitted(per_minute: int, used: int, kind: str) -> None:
    clock = FakeClock()
    limited = quota(clock, tokens=per_minute, pixels=per_minute)
    limited.take(kind, used)
    if is_admitted(limited, TOKENS, PIXELS):
        assert used < per_minute
        return

    with pytest.raises(QuotaExceededError) as caught:
        limited.admit(TOKENS, PIXELS)
    clock.advance(s=caught.value.retry_after_s - 1)
    assert not is_admitted(limited, TOKENS, PIXELS)
    clock.advance(s=1)
    assert is_admitted(limited, TOKENS, PIXELS)
    assert caught.value.kind == kind


def test_a_debt_is_waited_for_and_paid_once() -> None:
    clock = FakeClock()
    limited = quota(clock, tokens=60)
    limited.admit(TOKENS)
    limited.take(TOKENS, 180)

    with pytest.raises(QuotaExceededError) as caught:
        limited.admit(TOKENS)
    assert caught.value.retry_after_s == 121
    clock.advance(s=120)
    assert not is_admitted(limited, TOKENS)
    clock.advance(s=1)
    assert is_admitted(limited, TOKENS)
    clock.advance(s=3600)
    assert limited.standings()[TOKENS].remaining == 60


def test_the_message_names_key_kind_limit_and_wait_and_the_kind_that_takes_longest() -> None:
    clock = FakeClock()
    refusals: list[tuple[str, str]] = []
    limits = Limits(tokens=60, pixels=2_500_000)
    limited = Quota(limits, owner="alice", clock_ns=clock, on_refused=lambda owner, kind: refusals.append((owner, kind)))
    limited.take(TOKENS, 61)
    limited.take(PIXELS, 5_000_000)

    with pytest.raises(QuotaExceededError) as caught:
        limited.admit(TOKENS, PIXELS)

    assert str(caught.value) == "the quota of the key 'alice', 2.5 megapixels per minute, is used up; try again in 61 s"
    assert refusals == [("alice", PIXELS)]


def test_a_kind_without_a_limit_is_never_used_up() -> None:
    limited = quota(FakeClock(), requests=1)

    limited.take(TOKENS, 10**12)
    limited.admit(TOKENS, PIXELS)

    assert limited.is_limited
    assert not quota(FakeClock()).is_limited


def test_other_limits_give_nothing_and_forgive_nothing() -> None:
    clock = FakeClock()
    limited = quota(clock, requests=10, tokens=100)
    limited.take(REQUESTS, 8)
    limited.take(TOKENS, 150)

    limited.change(Limits(requests=10, tokens=1000))
    assert {kind: standing.remaining for kind, standing in limited.standings().items()} == {REQUESTS: 2, TOKENS: 0}
    clock.advance(s=3)
    assert not is_admitted(limited, TOKENS)
    clock.advance(s=0.1)
    assert is_admitted(limited, TOKENS)
    limited.change(Limits(requests=1, pixels=7))

    assert {kind: (each.limit, each.remaining) for kind, each in limited.standings().items()} == {REQUESTS: (1, 1), PIXELS: (7, 7)}


def test_a_clock_that_goes_back_gives_nothing() -> None:
    clock = FakeClock()
    limited = quota(clock, requests=1)
    limited.take(REQUESTS, 1)

    clock.advance(s=-30)
    assert not is_admitted(limited, REQUESTS)
    clock.advance(s=30)
    assert not is_admitted(limited, REQUESTS)


def test_a_limit_that_was_taken_away_and_put_back_forgives_no_debt() -> None:
    clock = FakeClock()
    limited = quota(clock, tokens=100)
    limited.take(TOKENS, 1000)

    limited.change(Limits(requests=5))
    assert is_admitted(limited, TOKENS)
    limited.change(Limits(tokens=100))

    assert not is_admitted(limited, TOKENS)
    clock.advance(ns=10 * MINUTE_NS)
    assert is_admitted(limited, TOKENS)
