"""The status page as an operator uses it: numbers that move, and a word that cannot be missed when something does not answer."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from engine.request import EngineStats
from tests.contract.running import RunningServer, fake_config, running_server
from tests.external.chat_page import PHONE, ChatPage, chat_page
from tests.vlm_server.test_health import probed_server
from vision.service import VisionStats
from vlm_server.readiness import ProbeReport
from vlm_server.stage_totals import StageTotal
from vlm_server.status_board import INTERVAL_S, Sample, StatusBoard

pytestmark = pytest.mark.external

NUM_BLOCKS = 200


def engine_at(at_s: float) -> EngineStats:
    """An engine that does the same every second."""
    at = int(at_s)
    return EngineStats(
        num_waiting=3,
        num_running=5,
        num_blocks=NUM_BLOCKS,
        num_referenced_blocks=50,
        num_cached_blocks=100,
        num_free_blocks=50,
        num_steps=10 * at,
        num_batched_requests=5,
        num_prompt_tokens=100 * at,
        num_cached_prompt_tokens=25 * at,
        num_output_tokens=40 * at,
        num_preemptions=7,
        num_images_waiting=2,
        num_images_encoded=2 * at,
        num_embedding_cache_hits=2 * at,
        num_embedding_cache_misses=2 * at,
        embedding_cache_bytes=3 << 20,
        encode_time_s=0.5 * at,
    )


def vision_at(at_s: float) -> VisionStats:
    at = int(at_s)
    return VisionStats(
        is_ready=True,
        num_in_flight={"fetch": 4, "decode": 1, "preprocess": 0},
        num_done={"fetch": at, "decode": at, "preprocess": at},
        time_s={"fetch": 0.2 * at, "decode": 0.01 * at, "preprocess": 0.03 * at},
        num_failed={"url_blocked": 12},
        num_pictures=4 * at,
        num_cache_hits=3 * at,
        num_cache_misses=at,
        cache_bytes=5 << 20,
    )


def sample_at(at_s: float) -> Sample:
    stages = {
        "queue": StageTotal(int(at_s), 0.05 * at_s),
        "prefill": StageTotal(int(at_s), 0.3 * at_s),
        "decode": StageTotal(int(at_s), at_s),
    }
    return Sample(at_s, engine_at(at_s), vision_at(at_s), stages)


@dataclass
class Numbers:
    """What the server's board tells; a test moves the time."""

    now_s: float = 600.0
    engine_answers: bool = True
    silence_s: float = 0.2

    @property
    def history(self) -> list[Sample]:
        return [sample_at(self.now_s - 300 + INTERVAL_S * number) for number in range(100)]

    async def sample(self) -> Sample:
        sample = sample_at(self.now_s)
        self.now_s += 1
        return sample if self.engine_answers else Sample(sample.at_s, None, sample.vision, sample.stages)


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> Numbers:
    numbers = Numbers()

    async def sample(board: StatusBoard) -> Sample:
        return await numbers.sample()

    monkeypatch.setattr(StatusBoard, "sample", sample)
    for name in ("history", "silence_s"):
        monkeypatch.setattr(StatusBoard, name, property(lambda board, name=name: getattr(numbers, name)))
    monkeypatch.setattr(StatusBoard, "uptime_s", property(lambda board: numbers.now_s))
    return numbers


@pytest.fixture
def page(browser_program: Browser, scripted: RunningServer, numbers: Numbers) -> Iterator[Page]:
    """The page, opened in a wide window."""
    with chat_page(browser_program, scripted.url) as tab:
        yield opened(tab)


def opened(tab: ChatPage, word: str = "Ready") -> Page:
    tab.page.goto(f"{tab.url}/ui/status")
    expect(state(tab.page)).to_have_text(word)
    return tab.page


def state(page: Page) -> Locator:
    return page.locator("#state")


def panel(page: Page, name: str) -> Locator:
    return page.get_by_role("region", name=name, exact=True)


def test_queue_batch_memory_caches_and_stages_are_told_in_numbers_and_drawn(page: Page, tmp_path: Path) -> None:
    expect(panel(page, "Requests").get_by_role("listitem")).to_have_text(["in the batch 5", "waiting 3"])
    expect(panel(page, "Tokens per second").get_by_role("listitem")).to_have_text(["written 40", "read 75"])
    expect(panel(page, "KV cache")).to_contain_text("25 % in use, 50 % kept for prefixes · 200 blocks of 16 tokens")
    expect(panel(page, "Pictures").get_by_role("list", name="Pictures in each stage now").get_by_role("listitem")).to_have_text(
        ["4Fetch", "1Decode", "0Preprocess", "2Encoder"]
    )
    stages = panel(page, "Stage times")
    for words in (
        "200 ms per picture",
        "10 ms per picture",
        "30 ms per picture",
        "50 ms per request",
        "250 ms per picture",
        "300 ms per request",
        "1.0 s per token",
    ):
        expect(stages).to_contain_text(f"{words} in the last minute")
    caches = panel(page, "Caches").get_by_role("row")
    expect(caches.nth(1)).to_contain_text(re.compile(r"Prefixes\s*25 %"))
    expect(caches.nth(2)).to_contain_text(re.compile(r"Embeddings\s*50 %.*3\.0 MB of 256\.0 MB"))
    expect(caches.nth(3)).to_contain_text(re.compile(r"Processed pictures\s*75 %.*5\.0 MB"))
    expect(panel(page, "Trouble since the start")).to_contain_text("url_blocked12")
    drawn = page.locator("svg.chart path.line")
    assert drawn.count() == 2 + 2 + 3 + 2 + 7
    for line in drawn.all():
        points = (line.get_attribute("d") or "").count("L")
        assert points >= 40, "five minutes are there from the beginning"
    page.screenshot(path=tmp_path / "status.png", full_page=True)


def test_the_numbers_move_every_second_until_they_are_paused(browser_program: Browser, scripted: RunningServer, numbers: Numbers) -> None:
    with chat_page(browser_program, scripted.url) as tab:
        tab.page.clock.install()
        page = opened(tab)
        first = numbers.now_s
        with page.expect_response("**/status"):
            page.clock.run_for(1000)
        assert numbers.now_s > first

        page.get_by_role("button", name="Pause").press("Enter")
        expect(page.get_by_role("button", name="Go on")).to_have_attribute("aria-pressed", "true")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.clock.run_for(60_000)
        assert asked == []

        with page.expect_response("**/status?history=true"):  # what was missed comes too
            page.get_by_role("button", name="Go on").press("Enter")


def test_every_chart_says_in_words_what_it_draws(page: Page) -> None:
    label = page.get_by_role("img", name=re.compile(r"Requests, last 5 minutes\. in the batch: 5 now, at most 5\. waiting: 3 now"))

    expect(label).to_be_visible()
    for image in page.get_by_role("img").all():
        name = image.get_attribute("aria-label") or image.locator("title").text_content()
        assert name, image


def test_the_pointer_reads_earlier_values_off_a_chart(page: Page) -> None:
    box = panel(page, "Requests").locator("svg.chart").bounding_box()
    assert box is not None

    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)

    expect(panel(page, "Requests")).to_contain_text(re.compile(r"1[45]\d s ago"))
    page.mouse.move(0, 0)
    expect(panel(page, "Requests")).not_to_contain_text("s ago")


def test_a_server_that_does_not_answer_is_said_so_and_found_again(page: Page, tmp_path: Path) -> None:
    page.route("**/status*", lambda route: route.abort())
    expect(state(page)).to_have_text("No answer")
    expect(page.locator("#alert")).to_contain_text(re.compile(r"The server does not answer\. What is shown is \d+ s old\."))
    expect(page.get_by_role("status")).to_contain_text("No answer")  # read out
    expect(page).to_have_title(re.compile("⚠ No answer"))
    page.screenshot(path=tmp_path / "no-answer.png")

    page.unroute("**/status*")

    expect(state(page)).to_have_text("Ready")
    expect(page.locator("#alert")).to_be_hidden()


def test_an_engine_that_is_down_silent_or_untried_is_said_so(page: Page, scripted: RunningServer, numbers: Numbers) -> None:
    engine = scripted.backend.engine
    numbers.engine_answers = False
    engine.state, engine.failure = "failed", "the checkpoint lacks a tensor"
    expect(state(page)).to_have_text("Engine failed")
    expect(page.locator("#alert")).to_contain_text("The engine is failed: the checkpoint lacks a tensor.")

    engine.state, engine.failure, numbers.silence_s = "ready", None, 42.0
    expect(state(page)).to_have_text("Engine silent")
    expect(page.locator("#alert")).to_contain_text("has not answered for 42 s")
    expect(panel(page, "Requests")).to_contain_text("in the batch –")
    for name in ("Requests", "Tokens per second", "KV cache"):
        expect(panel(page, name)).to_contain_text("no numbers from the engine now")

    numbers.silence_s, numbers.engine_answers = 0.1, True
    expect(state(page)).to_have_text("Ready")


def test_a_probe_that_failed_is_said_so(browser_program: Browser, numbers: Numbers) -> None:
    async def probe() -> ProbeReport:
        return ProbeReport(failed_stage="decode", message="decode: the decoder broke down over the picture")

    with probed_server(probe) as (server, _), chat_page(browser_program, server.url) as tab:
        page = opened(tab, "Not ready")
        expect(page.locator("#alert")).to_contain_text("decode: the decoder broke down over the picture")


def test_a_key_is_asked_for_and_used(browser_program: Browser, numbers: Numbers) -> None:
    with running_server(fake_config(api_keys=("secret",))) as server, chat_page(browser_program, server.url) as tab:
        tab.page.goto(f"{server.url}/ui/status")
        dialog = tab.page.get_by_role("dialog", name="API key")
        expect(dialog).to_be_visible()
        dialog.get_by_label("Key", exact=True).fill("wrong")
        dialog.get_by_label("Key", exact=True).press("Enter")
        expect(dialog).to_contain_text("does not know that key")
        dialog.get_by_label("Key", exact=True).fill("secret")
        dialog.get_by_label("Key", exact=True).press("Enter")

        expect(state(tab.page)).to_have_text("Ready")
        tab.page.reload()
        expect(state(tab.page)).to_have_text("Ready")


def test_whoever_gives_no_key_sees_that_it_is_locked(browser_program: Browser, numbers: Numbers) -> None:
    with running_server(fake_config(api_keys=("secret",))) as server, chat_page(browser_program, server.url) as tab:
        tab.page.goto(f"{server.url}/ui/status")
        tab.page.get_by_role("dialog", name="API key").press("Escape")

        expect(state(tab.page)).to_have_text("Locked")
        tab.page.get_by_role("button", name="Go on").click()
        expect(tab.page.get_by_role("dialog", name="API key")).to_be_visible()


def test_the_chat_is_a_link_away_and_the_keyboard_reaches_everything(page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the numbers")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Pause")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Chat")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("row", name="engine.num_preemptions 7")).to_be_visible()

    page.get_by_role("link", name="Chat").click()

    expect(page.get_by_role("textbox", name="Message")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(
    browser_program: Browser, scripted: RunningServer, numbers: Numbers, scheme: str
) -> None:
    with chat_page(browser_program, scripted.url, viewport=PHONE, is_mobile=True, has_touch=True, color_scheme=scheme) as tab:
        page = opened(tab)

        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        page.get_by_text("All numbers").click()
        expect(page.get_by_role("row", name="engine.num_preemptions 7")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_behind_a_prefix_the_page_finds_its_files_and_numbers(browser_program: Browser, numbers: Numbers) -> None:
    with running_server(fake_config(root_path="/vlm")) as server, chat_page(browser_program, server.url) as tab:
        tab.page.goto(f"{server.url}/vlm/ui/status")

        expect(state(tab.page)).to_have_text("Ready")
        tab.page.get_by_role("link", name="Chat").click()
        expect(tab.page).to_have_url(f"{server.url}/vlm/ui")


def test_budgets_are_drawn_where_the_server_tells_of_any(page: Page) -> None:
    expect(panel(page, "Budgets")).to_be_hidden()

    def with_budgets(route: Route) -> None:
        answer = route.fetch().json()
        answer["sample"]["vision"]["budgets"] = {
            "media_bytes": {"used": 3 << 20, "limit": 12 << 20, "num_waiting": 2, "num_refused": 5},
            "queued_tokens": {"used": 50, "limit": 200, "num_waiting": 0, "num_refused": 0},
        }
        route.fulfill(json=answer)

    page.route("**/status*", with_budgets)

    expect(panel(page, "Budgets").get_by_role("listitem")).to_have_text(
        ["media bytes3.0 MB of 12.0 MB · 2 waiting · 5 refused", "queued tokens50 of 200"]
    )
    assert [bar.get_attribute("aria-label") for bar in panel(page, "Budgets").get_by_role("img").all()] == ["25 %", "25 %"]


def test_numbers_of_a_server_that_was_started_again_begin_anew(page: Page) -> None:
    def of_a_new_server(route: Route) -> None:
        answer = route.fetch().json()
        answer["started_at"] += 100
        answer["sample"]["at_s"] = answer["uptime_s"] = 1.0
        route.fulfill(json=answer)

    page.route("**/status*", of_a_new_server)

    expect(page.locator("#facts")).to_contain_text("Up for1 s")
    expect(panel(page, "Tokens per second").get_by_role("listitem")).to_have_text(["written –", "read –"])
    expect(panel(page, "Requests").get_by_role("listitem")).to_have_text(["in the batch 5", "waiting 3"])


def test_nothing_that_the_server_tells_becomes_html(browser_program: Browser, numbers: Numbers) -> None:
    config = fake_config(model_name='<img src=x onerror="alert(1)">')
    with running_server(config) as server, chat_page(browser_program, server.url) as tab:
        page = opened(tab)

        expect(page.locator("#facts")).to_contain_text('<img src=x onerror="alert(1)">')
        assert page.locator("main img").count() == 0


def test_an_engine_that_starts_again_leaves_a_gap_and_no_wild_numbers(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    async def renewed(board: StatusBoard) -> Sample:
        sample = sample_at(700.0)
        return Sample(sample.at_s, engine_at(1.0), sample.vision, sample.stages)

    monkeypatch.setattr(StatusBoard, "sample", renewed)

    expect(panel(page, "Tokens per second").get_by_role("listitem")).to_have_text(["written –", "read –"])
