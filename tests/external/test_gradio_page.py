"""The gradio page as a person uses it: Debian's Chromium, without any network but the page's own address."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from playwright.sync_api import Page, Route, expect, sync_playwright

from tests.contract.running import RunningServer, running_server
from tests.vlm_server.byte_tokenizer import EOS
from vlm_server.examples import RED_CIRCLE

pytestmark = pytest.mark.external

CHROMIUM = "/usr/bin/chromium"
LIMIT_MS = 30_000
START_LIMIT_S = 90
HTML = (
    "It is <b>red</b> &amp; round <script>document.title = 'run'</script><img src='/x.png' onerror=\"document.title = 'run'\">\n\n"
    "# $$x$$ ![](/y.png)"
)
DROP = """
([base64]) => {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "red.png", {type: "image/png"}));
  return transfer;
}
"""


@dataclass
class Browser:
    """A page that reaches its own address only; what it asked of others is kept."""

    page: Page
    foreign_urls: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def ask(self, text: str) -> None:
        self.page.get_by_test_id("textbox").first.fill(text)
        self.page.get_by_test_id("textbox").first.press("Enter")

    def drop_picture(self) -> None:
        transfer = self.page.evaluate_handle(DROP, [RED_CIRCLE.partition(",")[2]])
        self.page.dispatch_event(".full-container", "drop", {"dataTransfer": transfer})
        expect(self.page.get_by_label("File thumbnail")).to_have_count(1, timeout=LIMIT_MS)

    def expect_answer(self, text: str) -> None:
        expect(self.page.get_by_test_id("bot").last).to_have_text(text, timeout=LIMIT_MS)

    def expect_idle(self) -> None:
        expect(self.page.get_by_label("Stop", exact=True)).to_have_count(0, timeout=LIMIT_MS)


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RunningServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def server(shared_server: RunningServer) -> RunningServer:
    shared_server.backend.reset()
    return shared_server


@pytest.fixture(scope="module")
def page_url(shared_server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The documented command, in LMDeploy's order of words."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = ["serve", "gradio", shared_server.url, "--server-name", "localhost", "--server-port", port]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("uploads"))}
    process = subprocess.Popen([sys.executable, "-m", "vlm_server.cli", *words], env=environment)
    try:
        wait_for(f"http://localhost:{port}", process)
        yield f"http://localhost:{port}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        finally:
            process.kill()
            process.wait()


def wait_for(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline_s = time.monotonic() + START_LIMIT_S
    while True:
        assert process.poll() is None, "the page's process ended"
        assert time.monotonic() < deadline_s, f"{url} did not answer within {START_LIMIT_S} s"
        try:
            if requests.get(url, timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.1)


@pytest.fixture
def browser(page_url: str, server: RunningServer) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        browser = Browser(chromium.new_page(viewport={"width": 1280, "height": 900}))
        browser.page.set_default_timeout(LIMIT_MS)
        browser.page.on("pageerror", lambda error: browser.errors.append(str(error)))

        def keep_inside(route: Route) -> None:
            parts = urlsplit(route.request.url)
            browser.urls.append(route.request.url)
            if parts.scheme in ("data", "blob") or f"{parts.scheme}://{parts.netloc}" == page_url:
                route.continue_()
            else:
                browser.foreign_urls.append(route.request.url)
                route.abort()

        browser.page.route("**/*", keep_inside)
        browser.page.goto(page_url)
        yield browser
        chromium.close()


def text_of(server: RunningServer) -> str:
    """The last prompt, without its pictures."""
    prompt, _ = server.backend.engine.requests[-1]
    return bytes(token_id for token_id in prompt.token_ids if token_id < 256).decode()


def test_a_dropped_picture_is_asked_about_and_the_answer_is_stopped_in_the_middle(
    browser: Browser, server: RunningServer, tmp_path: Path
) -> None:
    server.backend.engine.script = lambda prompt, params: [*b"It is a red circle.", EOS]
    server.backend.engine.hangs_after = 11

    browser.drop_picture()
    browser.ask("What is this?")
    browser.expect_answer("It is a red")
    browser.page.screenshot(path=tmp_path / "streaming.png")
    browser.page.get_by_label("Stop", exact=True).click()

    browser.expect_idle()  # also lets the page's requests through, which wait for this thread
    assert server.backend.activity.was_left_within(10)
    prompt, _ = server.backend.engine.requests[-1]
    assert [image.content_hash for image in prompt.images] == [RED_CIRCLE.encode()]
    assert text_of(server) == "user: What is this?\nassistant: "
    browser.expect_idle()
    server.backend.engine.hangs_after = None
    browser.ask("Sure?")
    browser.expect_answer("It is a red circle.")
    assert text_of(server) == "user: What is this?\nassistant: It is a red\nuser: Sure?\nassistant: "
    assert len(server.backend.engine.requests[-1][0].images) == 1
    browser.expect_idle()
    browser.page.screenshot(path=tmp_path / "wide.png")
    browser.page.set_viewport_size({"width": 390, "height": 844})
    browser.page.screenshot(path=tmp_path / "phone.png")
    assert browser.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert browser.foreign_urls == []
    assert browser.errors == []


def test_an_answer_of_html_stays_text(browser: Browser, server: RunningServer) -> None:
    server.backend.engine.script = lambda prompt, params: [*HTML.encode(), EOS]

    browser.ask("Paint.")
    browser.expect_answer(HTML)
    browser.expect_idle()

    answer = browser.page.get_by_test_id("bot").last
    assert [answer.locator(tag).count() for tag in ("b", "script", "img", "h1", ".katex")] == [0] * 5
    assert browser.page.title() == f"Chat with {server.model}"
    assert not any(url.endswith(("/x.png", "/y.png")) for url in browser.urls)
    browser.ask("Again.")
    browser.expect_idle()
    expect(browser.page.get_by_test_id("bot")).to_have_count(2, timeout=LIMIT_MS)
    assert text_of(server) == f"user: Paint.\nassistant: {HTML}\nuser: Again.\nassistant: "


def test_settings_reach_the_engine_and_a_failed_turn_is_told_and_forgotten(browser: Browser, server: RunningServer, tmp_path: Path) -> None:
    page = browser.page
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System text").fill("Be brief.")
    page.get_by_role("textbox", name="Temperature").fill("warm")

    browser.ask("One?")
    browser.expect_answer("error: Temperature: warm is no number")
    browser.expect_idle()
    page.get_by_role("textbox", name="Temperature").fill("0.25")
    page.get_by_role("textbox", name="Top p").fill("3")
    browser.ask("Two?")
    browser.expect_answer("error: top_p: Input should be less than or equal to 1 (HTTP 400)")
    browser.expect_idle()
    page.get_by_role("textbox", name="Top p").fill("0.5")
    page.get_by_role("textbox", name="Tokens at most").fill("5")
    browser.ask("Three?")
    browser.expect_answer("Hello")
    page.screenshot(path=tmp_path / "settings.png", full_page=True)

    params = server.backend.engine.requests[-1][1]
    assert (params.temperature, params.top_p, params.max_tokens) == (0.25, 0.5, 5)
    assert text_of(server) == "system: Be brief.\nuser: Three?\nassistant: "


def posted(page_url: str, number: int, data: list[object]) -> bytes:
    """How gradio answers a hand-made event."""
    requests.post(f"{page_url}/gradio_api/queue/join", json={"data": data, "fn_index": number, "session_hash": "s"}, timeout=10)
    with requests.get(f"{page_url}/gradio_api/queue/data?session_hash=s", stream=True, timeout=10) as events:
        return next(line for line in events.iter_lines() if b"process_completed" in line)


def test_the_page_gives_no_file_away(page_url: str, server: RunningServer, tmp_path: Path) -> None:
    """Neither of temporary files nor of those where it was started, which gradio gives away where a page is mounted and not launched."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")

    for path in (secret, Path("assets/demo_model/secret.png").absolute(), Path("/etc/passwd")):
        file = {"path": str(path), "mime_type": "image/png", "meta": {"_type": "gradio.FileData"}}
        ends = [
            posted(page_url, 0, [{"text": "x", "files": [file]}]),
            posted(page_url, 1, [None, []]),
            posted(page_url, 2, [None, None, server.model, "", "", "", ""]),
        ]
        assert [b'"success":false' in end for end in ends] == [True] * 3
        assert requests.get(f"{page_url}/gradio_api/file={path}", timeout=10).status_code in (403, 404)
    assert server.backend.engine.requests == []


def test_the_browser_is_told_to_refuse_other_addresses(page_url: str) -> None:
    assert "default-src 'self'" in requests.get(page_url, timeout=10).headers["content-security-policy"]


def test_a_port_that_is_taken_ends_with_one_line(shared_server: RunningServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "vlm_server.cli", "gradio", shared_server.url, "--server-port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_LIMIT_S)

    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"vlm-server: cannot listen on 127.0.0.1:{port}: ")
