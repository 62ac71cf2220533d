"""The Swagger page as a person uses it: Debian's Chromium, without any network but the server's own address."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Locator, Page, Route, expect, sync_playwright

from tests.server_process import ServerProcess, server_process

pytestmark = pytest.mark.external

CHROMIUM = "/usr/bin/chromium"
PAGE_LIMIT_MS = 30_000
ANSWER_LIMIT_MS = 60_000


@dataclass
class Browser:
    """A page that reaches the server only; what it asked of others is kept."""

    page: Page
    foreign_urls: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with server_process() as server:
        yield server


@pytest.fixture
def browser(server: ServerProcess) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        browser = Browser(chromium.new_page(viewport={"width": 1280, "height": 1600}))
        browser.page.set_default_timeout(PAGE_LIMIT_MS)
        browser.page.on("pageerror", lambda error: browser.errors.append(str(error)))

        def keep_inside(route: Route) -> None:
            parts = urlsplit(route.request.url)
            if parts.scheme in ("data", "blob") or f"{parts.scheme}://{parts.netloc}" == server.url:
                route.continue_()
            else:
                browser.foreign_urls.append(route.request.url)
                route.abort()

        browser.page.route("**/*", keep_inside)
        browser.page.goto(server.url)
        yield browser
        chromium.close()


def opened(page: Page, method: str, path: str) -> Locator:
    """The block of one operation, unfolded, with its "Try it out" pressed."""
    exact = page.locator(f'[data-path="{path}"]')
    block = page.locator(f".opblock-{method}").filter(has=exact)
    block.locator(".opblock-summary-control").click()
    block.get_by_role("button", name="Try it out").click()
    return block


def execute(block: Locator) -> dict[str, Any]:
    """Press "Execute"; the answer, of status 200 and shown on the page."""
    with block.page.expect_response(lambda response: "/v1/" in response.url, timeout=ANSWER_LIMIT_MS) as awaited:
        block.get_by_role("button", name="Execute").click()
    answer: dict[str, Any] = awaited.value.json()
    shown = block.locator(".live-responses-table .response")
    expect(shown.locator(".response-col_status")).to_have_text("200")
    expect(shown.locator(".response-col_description")).to_contain_text(answer["id"] if "id" in answer else answer["data"][0]["id"])
    return answer


def choose_example(block: Locator, name: str) -> None:
    block.locator(".examples-select select, select.examples-select-element").first.select_option(name)


def test_the_page_answers_when_try_it_out_is_pressed_and_needs_nobody_else(browser: Browser, tmp_path: Path) -> None:
    page = browser.page

    models = execute(opened(page, "get", "/v1/models"))
    completion = execute(opened(page, "post", "/v1/completions"))
    chat = opened(page, "post", "/v1/chat/completions")
    choose_example(chat, "text")
    text_answer = execute(chat)
    choose_example(chat, "image")
    image_answer = execute(chat)
    page.screenshot(path=tmp_path / "swagger.png", full_page=True)

    assert models["data"][0]["object"] == "model"
    assert completion["choices"][0]["text"]
    assert text_answer["choices"][0]["message"]["content"]
    assert text_answer["usage"]["prompt_tokens_details"]["image_tokens"] == 0
    assert image_answer["choices"][0]["message"]["content"]
    assert image_answer["usage"]["prompt_tokens_details"]["image_tokens"] > 0
    assert (tmp_path / "swagger.png").stat().st_size > 0
    assert browser.foreign_urls == []
    assert browser.errors == []
