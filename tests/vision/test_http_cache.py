"""When a picture that was downloaded before may be used again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from vision.http_cache import MAX_LIFETIME_S, HttpCache

KEY = ("", "http://a.example/b.png")
DATE = "Sat, 21 Nov 2026 10:00:00 GMT"
LATER = "Sat, 21 Nov 2026 10:01:00 GMT"


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def kept(headers: dict[str, str] | list[tuple[str, str]]) -> tuple[HttpCache, Clock]:
    """A cache that was given a picture with these headers just now."""
    clock = Clock()
    cache = HttpCache(1 << 20, clock=clock)
    cache.put(KEY, b"picture", CIMultiDict(headers), asked_s=clock.now_s)
    return cache, clock


@pytest.mark.parametrize(
    ("headers", "lifetime_s"),
    [
        ({"Cache-Control": "max-age=60"}, 60),
        ({"Cache-Control": "public, Max-Age=60, immutable"}, 60),
        ({"Cache-Control": "private, max-age=60"}, 60),  # each tenant's cache is private
        ({"Cache-Control": "max-age=60", "Age": "50"}, 10),
        ({"Cache-Control": "max-age=60, s-maxage=5"}, 60),
        ({"Date": DATE, "Expires": LATER}, 60),
        ({"Date": DATE, "Expires": LATER, "Cache-Control": "max-age=30"}, 30),
        ({"Cache-Control": "max-age=99999999"}, MAX_LIFETIME_S),
    ],
)
def test_a_picture_is_fresh_for_as_long_as_its_server_says(headers: dict[str, str], lifetime_s: float) -> None:
    cache, clock = kept(headers)

    clock.now_s += lifetime_s - 0.001
    assert cache.fresh(KEY) == b"picture"
    clock.now_s += 0.001
    assert cache.fresh(KEY) is None


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"a"'},
        {"ETag": '"a"', "Cache-Control": "no-cache"},
        {"ETag": '"a"', "Cache-Control": "max-age=60, no-cache"},
        {"ETag": '"a"', "Cache-Control": "max-age=0"},
        {"ETag": '"a"', "Cache-Control": "max-age=-5"},
        {"ETag": '"a"', "Cache-Control": "max-age=60", "Age": "60"},
        {"ETag": '"a"', "Expires": "0"},
        {"ETag": '"a"', "Date": LATER, "Expires": DATE},
        {"Last-Modified": DATE},
    ],
)
def test_a_picture_without_a_lifetime_is_asked_for_again_under_its_validators(headers: dict[str, str]) -> None:
    cache, _ = kept(headers)
    stored = cache.stored(KEY)

    assert cache.fresh(KEY) is None
    assert stored is not None
    assert stored.conditions == ({"If-None-Match": '"a"'} if "ETag" in headers else {"If-Modified-Since": DATE})


@pytest.mark.parametrize(
    "headers", [{}, {"Cache-Control": "no-store, max-age=60", "ETag": '"a"'}, {"Vary": "*", "ETag": '"a"'}, {"Cache-Control": "public"}]
)
def test_what_may_not_be_kept_or_would_be_of_no_use_is_not(headers: dict[str, str]) -> None:
    cache, _ = kept(headers)

    assert cache.stored(KEY) is None
    assert cache.num_bytes == 0


def test_a_later_answer_that_may_not_be_kept_ends_the_earlier_one() -> None:
    cache, clock = kept({"Cache-Control": "max-age=60"})

    cache.put(KEY, b"other", CIMultiDict({"Cache-Control": "no-store"}), asked_s=clock.now_s)

    assert cache.fresh(KEY) is None


def test_a_304_renews_the_lifetime_and_keeps_the_validators() -> None:
    cache, clock = kept({"ETag": '"a"', "Cache-Control": "max-age=60"})
    clock.now_s += 100
    stored = cache.stored(KEY)
    assert stored is not None

    data = cache.revalidated(KEY, stored, CIMultiDict({"Cache-Control": "max-age=60"}), asked_s=clock.now_s)

    renewed = cache.stored(KEY)
    assert (data, cache.fresh(KEY), cache.num_revalidated) == (b"picture", b"picture", 1)
    assert renewed is not None
    assert renewed.etag == '"a"'


@pytest.mark.parametrize(
    "lines",
    [
        [("Cache-Control", "max-age=60"), ("Cache-Control", "no-store")],
        [("Cache-Control", "max-age=60"), ("Vary", "Accept"), ("Vary", "*")],
        [("Cache-Control", "max-age=60"), ("Vary", "Accept, *")],
    ],
)
def test_all_lines_of_a_header_count(lines: list[tuple[str, str]]) -> None:
    cache, _ = kept(lines)

    assert cache.stored(KEY) is None


@pytest.mark.parametrize("header", [("Cache-Control", "no-store"), ("Vary", "*")])
def test_a_304_that_forbids_keeping_ends_what_was_kept(header: tuple[str, str]) -> None:
    cache, clock = kept({"ETag": '"a"'})
    stored = cache.stored(KEY)
    assert stored is not None

    data = cache.revalidated(KEY, stored, CIMultiDict([header]), asked_s=clock.now_s)

    assert data == b"picture"
    assert cache.stored(KEY) is None


def test_tenants_see_only_their_own() -> None:
    cache, _ = kept({"Cache-Control": "max-age=60"})

    assert cache.fresh(("other", KEY[1])) is None


@given(st.dictionaries(st.sampled_from(["Cache-Control", "Age", "Expires", "Date", "ETag", "Vary"]), st.text()))
def test_no_header_is_an_error_or_makes_a_picture_fresh_for_longer_than_a_day(headers: dict[str, str]) -> None:
    cache, clock = kept(headers)

    clock.now_s += MAX_LIFETIME_S

    assert cache.fresh(KEY) is None
    assert cache.num_bytes <= 1 << 20


def test_a_pictures_url_and_what_it_is_asked_for_with_count() -> None:
    cache, _ = kept({"ETag": "e" * 8000, "Last-Modified": "l" * 8000, "Cache-Control": "max-age=60"})

    num_bytes = cache.num_bytes
    cache.put(("tenant", KEY[1] + "a" * 8000), b"picture", CIMultiDict({"Cache-Control": "max-age=60"}), asked_s=cache.now_s())

    assert num_bytes > len(b"picture") + 16_000
    assert cache.num_bytes - num_bytes > len(b"picture") + 8000
