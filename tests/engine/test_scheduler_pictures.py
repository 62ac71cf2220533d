"""Requests with pictures, by example: what is encoded when, who waits for it, what stays, and how chunks cut it."""

import gc
import weakref

import pytest

from engine.pictures import MAX_IMAGES_AHEAD
from engine.request import ImageInput, ImagePiece, ImageSpan, Prompt, Request, SamplingParams
from tests.engine.scheduling import add, make_scheduler, run_out, say, shape, step


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
        scheduler.commit(plan, say(plan))

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
