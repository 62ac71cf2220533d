from hypothesis import given
from hypothesis import strategies as st

from vision.cache import ByteBoundedCache


def test_a_value_is_found_again_and_hits_and_misses_are_counted() -> None:
    cache: ByteBoundedCache[str, int] = ByteBoundedCache(100)
    cache.put("a", 1, 60)

    assert (cache.get("a"), cache.get("b")) == (1, None)
    assert (cache.num_hits, cache.num_misses, cache.num_bytes, len(cache)) == (1, 1, 60, 1)


def test_what_was_used_longest_ago_goes_first() -> None:
    cache: ByteBoundedCache[str, int] = ByteBoundedCache(100)
    for name in "abc":
        cache.put(name, 0, 30)
    cache.get("a")

    cache.put("d", 0, 30)

    assert [name for name in "abcd" if cache.get(name) is not None] == ["a", "c", "d"]


def test_a_value_larger_than_the_cache_is_not_kept_and_pushes_nothing_out() -> None:
    cache: ByteBoundedCache[str, int] = ByteBoundedCache(100)
    cache.put("a", 1, 100)

    cache.put("b", 2, 101)

    assert (cache.get("a"), cache.get("b"), cache.num_bytes) == (1, None, 100)


def test_a_key_that_is_put_again_is_counted_once() -> None:
    cache: ByteBoundedCache[str, int] = ByteBoundedCache(100)
    cache.put("a", 1, 70)

    cache.put("a", 2, 40)

    assert (cache.get("a"), cache.num_bytes) == (2, 40)


def test_the_number_of_entries_is_bounded_too() -> None:
    cache: ByteBoundedCache[int, int] = ByteBoundedCache(100, max_entries=2)
    for key in range(5):
        cache.put(key, key, 0)

    assert [key for key in range(5) if cache.get(key) is not None] == [3, 4]


def test_a_cleared_cache_holds_nothing() -> None:
    cache: ByteBoundedCache[str, int] = ByteBoundedCache(100)
    cache.put("a", 1, 10)

    cache.clear()

    assert (cache.get("a"), cache.num_bytes, len(cache)) == (None, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60), st.booleans())), st.integers(0, 5))
def test_it_never_holds_more_than_allowed_and_its_sum_is_right(operations: list[tuple[int, int, bool]], max_entries: int) -> None:
    cache: ByteBoundedCache[int, int] = ByteBoundedCache(100, max_entries=max_entries)

    for key, num_bytes, is_put in operations:
        if is_put:
            cache.put(key, num_bytes, num_bytes)
        else:
            cache.get(key)
        assert cache.num_bytes <= 100
        assert len(cache) <= max_entries

    assert cache.num_bytes == sum(cache.get(key) or 0 for key in range(10))
