"""The chat page by keyboard, by screen reader, on a phone, in light and in dark."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.contract import fake_engine
from tests.contract.fake_engine import DEFAULT_REPLY
from tests.contract.running import RunningServer
from tests.external.chat_page import PHONE, WIDE, ChatPage, answers, chat_page, picture

pytestmark = pytest.mark.external

LIMIT_S = 10
BEGINNING = "Hello!"
ON_A_PHONE = {"viewport": PHONE, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
WINDOWS = {"wide": {"viewport": WIDE}, "phone": ON_A_PHONE}
LONG = f"""A word{"d" * 120} and `{"code" * 40}`

| {" | ".join(["column"] * 14)} |
|{"--|" * 14}
| {" | ".join(["value"] * 14)} |

```
{"a line of code that does not end " * 10}
```

https://address.example/{"path/" * 40}"""
NAMED_ROLES = {"button", "textbox", "combobox", "spinbutton", "checkbox", "link", "dialog", "navigation", "complementary", "image"}
FOCUSED = "document.activeElement.getAttribute('aria-label') ?? document.activeElement.innerText"
FONT_SIZES = "all => all.map((it) => parseFloat(getComputedStyle(it).fontSize))"


def nameless(page: Page) -> list[str]:
    """What a screen reader meets and has no name for."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    met = [node for node in nodes if not node["ignored"] and node["role"]["value"] in NAMED_ROLES]
    assert len(met) >= 5  # those of the smallest dialog
    return [node["role"]["value"] for node in met if not node["name"]["value"].strip()]


def tab_stops(page: Page, *, start: str) -> list[str]:
    """What Tab reaches after the element `start`, as it is called, until it comes back to the first."""
    page.locator(start).focus()
    stops: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name = " ".join(page.evaluate(FOCUSED).split()) if page.evaluate("document.activeElement !== document.body") else ""
        if not name or name == "Skip to the message box":
            return stops
        stops.append(name)
    raise AssertionError(stops)


def is_within_the_window(page: Page) -> bool:
    """Nothing reaches over the right edge, neither as a page that scrolls nor cut off."""
    script = """() => document.documentElement.scrollWidth <= innerWidth && document.body.scrollWidth <= innerWidth
      && document.querySelector("#scroller").scrollWidth <= document.querySelector("#scroller").clientWidth"""
    return bool(page.evaluate(script))


def test_the_whole_way_by_keyboard(chat: ChatPage, scripted: RunningServer) -> None:
    keyboard = chat.page.keyboard
    expect(chat.message).to_be_focused()
    keyboard.type("First line")
    keyboard.press("Shift+Enter")
    keyboard.type("second line")
    height = chat.message.bounding_box()["height"]
    keyboard.press("Enter")
    chat.answered()
    assert bytes(scripted.backend.engine.requests[0][0].token_ids[1:]) == b"user: First line\nsecond line\nassistant: "
    expect(chat.message).to_be_focused()
    assert chat.message.bounding_box()["height"] < height  # it grew and is small again

    scripted.backend.engine.hangs_after = len(BEGINNING)
    keyboard.type("Go on")
    keyboard.press("Enter")
    expect(chat.answers.last).to_contain_text(BEGINNING)
    keyboard.type("not sent yet")
    keyboard.press("Enter")
    keyboard.press("Escape")
    expect(chat.answers.last).to_contain_text("Stopped")
    assert scripted.backend.activity.was_left_within(LIMIT_S)
    expect(chat.message).to_have_value("not sent yet")
    expect(chat.questions).to_have_count(2)


def test_enter_that_ends_a_composition_sends_nothing(chat: ChatPage, scripted: RunningServer) -> None:
    chat.message.fill("にほん")
    chat.message.dispatch_event("keydown", {"key": "Enter", "isComposing": True, "bubbles": True, "cancelable": True})

    expect(chat.message).to_have_value("にほん")
    assert scripted.backend.engine.requests == []


def test_tab_goes_through_the_page_in_the_order_of_its_parts(chat: ChatPage) -> None:
    assert tab_stops(chat.page, start=".skip-link") == [
        "New chat",
        "Model",
        "Settings",
        "Try it with an example picture",
        "Add pictures",
        "Message",
    ]

    chat.ask("A question", picture("cat.png"))
    chat.answered()
    assert tab_stops(chat.page, start=".skip-link") == [
        *("New chat", "A question", "Rename A question", "Delete A question", "Model", "Settings"),
        *("Show cat.png", "Edit this message", "Copy this message"),
        next(stop for stop in tab_stops(chat.page, start="[aria-label='Copy this message']") if "tokens" in stop),
        *("Copy the answer", "Answer again", "Add pictures", "Message"),
    ]  # fmt: skip
    chat.page.locator(".skip-link").focus()
    chat.page.keyboard.press("Enter")
    expect(chat.message).to_be_focused()


def test_everything_has_a_name(chat: ChatPage) -> None:
    assert nameless(chat.page) == []
    chat.choose(picture("cat.png"))
    assert nameless(chat.page) == []
    chat.ask("A question")
    chat.answered()
    assert nameless(chat.page) == []
    chat.page.get_by_role("button", name="Settings").click()
    assert nameless(chat.page) == []
    chat.page.get_by_role("button", name="API key…").click()
    assert nameless(chat.page) == []
    chat.page.keyboard.press("Escape")
    expect(chat.page.get_by_role("dialog")).to_have_count(0)
    expect(chat.page.get_by_role("heading", level=1)).to_have_text("A question")
    expect(chat.page.get_by_role("heading", level=2)).to_have_text(["You", "Answer"])
    assert chat.page.locator("html").get_attribute("lang") == "en"


def test_a_screen_reader_hears_that_an_answer_comes_and_has_come_but_not_each_word(chat: ChatPage, scripted: RunningServer) -> None:
    status = chat.page.get_by_role("status")
    scripted.backend.engine.hangs_after = len(BEGINNING)
    chat.ask("A question")
    expect(status).to_have_text("Answering")
    chat.stop_button.click()
    expect(status).to_have_text("Stopped")
    scripted.backend.engine.hangs_after = None
    chat.ask("Another")
    expect(status).to_have_text("Answer finished")

    assert chat.page.evaluate("document.querySelector('#turns').closest('[aria-live], [role=log], [role=status]')") is None


def test_a_picture_is_shown_large_and_escape_closes_it(chat: ChatPage) -> None:
    chat.ask("Look", picture("cat.png"))
    chat.answered()
    chat.questions.get_by_role("button", name="Show cat.png").click()
    expect(chat.page.get_by_role("dialog", name="Picture").get_by_role("img", name="cat.png")).to_be_visible()

    chat.page.keyboard.press("Escape")

    expect(chat.page.get_by_role("dialog")).to_have_count(0)
    expect(chat.questions.get_by_role("button", name="Show cat.png")).to_be_focused()


def test_on_a_phone_the_list_is_a_drawer_and_enter_breaks_the_line(browser_program: Browser, scripted: RunningServer) -> None:
    with chat_page(browser_program, scripted.url, **ON_A_PHONE) as chat:
        chat.open()
        chat.message.tap()
        chat.page.keyboard.type("One")
        chat.page.keyboard.press("Enter")
        chat.page.keyboard.type("two")
        expect(chat.message).to_have_value("One\ntwo")
        chat.page.get_by_role("button", name="Send").tap()
        chat.answered()
        expect(chat.answers).to_contain_text(DEFAULT_REPLY)

        opener = chat.page.get_by_role("button", name="Conversations", exact=True)
        expect(chat.conversations).to_have_count(0)  # out of reach while it is closed
        opener.tap()
        expect(opener).to_have_attribute("aria-expanded", "true")
        expect(chat.conversations).to_have_text(["One"])
        chat.page.keyboard.press("Escape")
        expect(opener).to_be_focused()
        opener.tap()
        chat.page.get_by_role("button", name="New chat").tap()
        expect(opener).to_have_attribute("aria-expanded", "false")
        expect(chat.page.get_by_role("heading", name="Ask about a picture")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", WINDOWS)
def test_nothing_reaches_over_the_edge_and_the_message_box_stays_in_view(
    browser_program: Browser, scripted: RunningServer, window: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_engine, "SESSION_LEN", 8192)
    answers(scripted, LONG)
    with chat_page(browser_program, scripted.url, color_scheme=scheme, **WINDOWS[window]) as chat:
        page = chat.page

        def look(name: str) -> None:
            page.screenshot(path=tmp_path / f"{window}-{scheme}-{name}.png")
            assert is_within_the_window(page), name
            box = page.locator("#composer").bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= page.viewport_size["width"]
            assert box["y"] + box["height"] <= page.viewport_size["height"], name

        chat.open()
        look("empty")
        chat.choose(*(picture(f"a-picture-with-a-rather-long-name-{number}.png") for number in range(5)))
        chat.message.fill("\n".join(["A line that is long enough to be broken on a phone, and then some more of it"] * 30))
        look("written")
        page.get_by_role("button", name="Send").click()
        chat.answered()
        chat.answers.locator("summary").click()
        look("answered")
        scripted.backend.engine.hangs_after = 40
        page.get_by_role("button", name="Answer again").click()
        expect(chat.answers).to_have_attribute("aria-busy", "true")
        expect(chat.answers.locator(".markdown")).to_contain_text("A word")
        look("growing")
        chat.stop_button.click()
        page.get_by_role("button", name="Settings").click()
        look("settings")
        if window == "phone":  # it zooms in on smaller letters
            sizes = page.locator("input:visible, textarea:visible, select:visible").evaluate_all(FONT_SIZES)
            assert min(sizes) >= 16


def luminance(color: str) -> float:
    """Of `#rrggbb`, as the WCAG define it."""
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser_program: Browser, scripted: RunningServer, scheme: str) -> None:
    with chat_page(browser_program, scripted.url, color_scheme=scheme) as chat:
        chat.open()
        script = "(name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim()"
        for text, grounds in {
            "text": ("ground", "side", "raised", "sunken", "tint"),
            "muted": ("ground", "side", "raised", "sunken"),
            "accent": ("ground", "raised"),
            "danger": ("ground", "side", "danger-tint"),
            "on-accent": ("accent", "accent-strong"),
        }.items():
            for ground in grounds:
                found = contrast(chat.page.evaluate(script, text), chat.page.evaluate(script, ground))
                assert found >= 4.5, (scheme, text, ground, found)


def test_a_dragged_file_shows_where_it_can_be_dropped(chat: ChatPage) -> None:
    script = """(type) => { const transfer = new DataTransfer(); transfer.items.add(new File([], "x.png"));
      document.body.dispatchEvent(new DragEvent(type, { bubbles: true, cancelable: true, dataTransfer: transfer })) }"""
    zone = chat.page.get_by_text(re.compile("Drop pictures to add"))
    chat.page.evaluate(script, "dragenter")
    expect(zone).to_be_visible()

    chat.page.evaluate(script, "dragleave")

    expect(zone).to_be_hidden()
