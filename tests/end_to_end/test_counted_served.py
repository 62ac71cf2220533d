"""`POST /tokenize` knows from a picture's header what a chat with it will be charged, at every resolution that a request may ask for."""

from collections.abc import Iterator

import pytest

from tests.end_to_end.counted import DETAILS, chat, counted, file_of, sizes, tokens_before, tokens_charged, tokens_of
from tests.image_fixtures import tiny_folder
from tests.server_process import ServerProcess, server_process

pytestmark = pytest.mark.full

NUM_SIZES = {"idefics3": 100, "qwen2_vl": 100, "llava_next": 24, "gemma3": 24}
# Budgets in the picture's part, and settings of the whole request, that each family's processor has.
ASKED = {
    "idefics3": [
        ({"max_pixels": 900}, {}),
        ({"min_pixels": 20_000}, {}),
        ({}, {"do_image_splitting": False, "size": {"longest_edge": 40}}),
    ],
    "qwen2_vl": [
        ({"min_pixels": 5000, "max_pixels": 9000}, {}),
        ({"max_pixels": 2000}, {"size": {"shortest_edge": 900, "longest_edge": 8000}}),
    ],
    "llava_next": [({"max_pixels": 900}, {}), ({}, {"min_pixels": 200_000})],
    "gemma3": [({"max_pixels": 900}, {}), ({}, {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20})],
}


@pytest.fixture(scope="module", params=NUM_SIZES)
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, ServerProcess]]:
    with server_process(tiny_folder(request.param), "--session-len", "4096") as server:
        yield request.param, server


def test_many_sizes_at_each_detail_are_charged_what_their_headers_said(served: tuple[str, ServerProcess]) -> None:
    name, server = served

    results = [
        counted(server.url, size, detail, is_on_its_side=number % 4 == 3)
        for number, size in enumerate(sizes(NUM_SIZES[name]))
        for detail in DETAILS
    ]

    assert len(results) == NUM_SIZES[name] * len(DETAILS)
    assert [result for result in results if result.before != result.charged] == []
    refused = {result.size for result in results if not isinstance(result.before, int)}
    assert all(name == "qwen2_vl" and max(size) > 200 * min(size) for size in refused), "its processor takes no longer ones"
    by_detail = [[result.before for result in results if result.detail == detail and result.size not in refused] for detail in DETAILS]
    assert all(low <= auto <= high for auto, low, high in zip(*by_detail, strict=True))


def test_budgets_and_settings_are_charged_what_the_headers_said(served: tuple[str, ServerProcess]) -> None:
    name, server = served

    for size in ((70, 110), (900, 300), (1, 1), (1024, 700)):
        file = file_of(size, is_on_its_side=True)
        for part, settings in ASKED[name]:
            messages = chat(file, **part)
            before = tokens_before(server.url, messages, mm_processor_kwargs=settings)

            assert before == tokens_charged(server.url, messages, mm_processor_kwargs=settings)
            assert isinstance(before, int)


def test_a_picture_on_its_side_is_counted_as_it_is_shown(served: tuple[str, ServerProcess]) -> None:
    name, server = served

    stored, turned, shown = (
        tokens_of(server.url, chat(file_of(size, is_on_its_side=is_on_its_side)))
        for size, is_on_its_side in (((300, 900), False), ((300, 900), True), ((900, 300), False))
    )

    assert turned == shown
    assert (stored != shown) == (name in ("idefics3", "llava_next")), "the others' tokens do not tell rows from columns"
