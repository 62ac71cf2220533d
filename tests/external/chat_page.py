"""The chat page in Debian's Chromium, over a scripted engine: what a test does to it, and what it must never do."""

import base64
import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from PIL import Image, ImageDraw
from playwright.sync_api import Browser as Chromium
from playwright.sync_api import BrowserContext, Locator, Page, Route, expect, sync_playwright

from engine.request import Prompt, SamplingParams
from tests.contract.running import RunningServer
from tests.vlm_server.byte_tokenizer import EOS

CHROMIUM = "/usr/bin/chromium"
PAGE_LIMIT_MS = 15_000
WIDE = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


@dataclass(frozen=True, slots=True)
class File:
    """As a person has it on the disk."""

    name: str
    media_type: str
    content: bytes

    @property
    def payload(self) -> Any:
        return {"name": self.name, "mimeType": self.media_type, "buffer": self.content}


def picture(name: str = "shapes.png", *, color: str = "tomato", size: tuple[int, int] = (320, 240), ending: bytes = b"") -> File:
    """A PNG of an ellipse. `ending` follows the picture's own bytes, which every reader ignores."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((size[0] // 5, size[1] // 5, size[0] * 4 // 5, size[1] * 4 // 5), fill=color)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return File(name, "image/png", stream.getvalue() + ending)


def answers(server: RunningServer, text: str) -> None:
    """From now on the engine writes this."""

    def script(prompt: Prompt, params: SamplingParams) -> Sequence[int]:
        return [*text.encode(), EOS]

    server.backend.engine.script = script


@contextlib.contextmanager
def chromium() -> Iterator[Chromium]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@dataclass
class ChatPage:
    """One tab at `/ui`. What it asked of other hosts and what went wrong in it is kept, and has to be nothing."""

    url: str  # of the server
    context: BrowserContext
    page: Page
    foreign_urls: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @property
    def message(self) -> Locator:
        return self.page.get_by_role("textbox", name="Message")

    @property
    def answers(self) -> Locator:
        return self.page.locator(".answer")

    @property
    def questions(self) -> Locator:
        return self.page.locator(".question")

    @property
    def stop_button(self) -> Locator:
        return self.page.get_by_role("button", name="Stop", exact=True)

    @property
    def attachments(self) -> Locator:
        return self.page.get_by_role("list", name="Pictures of this message").get_by_role("listitem")

    @property
    def conversations(self) -> Locator:
        return self.page.get_by_role("navigation", name="Earlier conversations").get_by_role("listitem")

    def open(self, path: str = "/ui") -> None:
        self.page.goto(self.url + path)
        expect(self.page.get_by_role("combobox", name="Model")).to_be_enabled()

    def ask(self, text: str, *files: File) -> None:
        if files:
            self.choose(*files)
        self.message.fill(text)
        self.message.press("Enter")

    def answered(self) -> None:
        """Waits until the last answer is whole."""
        expect(self.stop_button).to_be_hidden()
        expect(self.answers.last).to_have_attribute("aria-busy", "false")

    def choose(self, *files: File) -> None:
        self.page.get_by_label("Choose pictures").set_input_files([file.payload for file in files])
        expect(self.page.get_by_text("Reading…")).to_have_count(0)

    def drop(self, *files: File) -> None:
        self._transfer("drop", *files)

    def paste(self, *files: File) -> None:
        self._transfer("paste", *files)

    def _transfer(self, event: str, *files: File) -> None:
        data = [[file.name, file.media_type, base64.b64encode(file.content).decode()] for file in files]
        self.page.evaluate(_TRANSFER, [event, data])
        expect(self.page.get_by_text("Reading…")).to_have_count(0)


_TRANSFER = """
([name, files]) => {
  const transfer = new DataTransfer();
  for (const [name, type, content] of files) {
    transfer.items.add(new File([Uint8Array.from(atob(content), (byte) => byte.charCodeAt(0))], name, { type }));
  }
  const options = { bubbles: true, cancelable: true };
  const target = document.querySelector("#turns");
  if (name === "paste") target.dispatchEvent(new ClipboardEvent("paste", { ...options, clipboardData: transfer }));
  else for (const event of ["dragenter", "dragover", "drop"]) {
    target.dispatchEvent(new DragEvent(event, { ...options, dataTransfer: transfer }));
  }
}
"""


@contextlib.contextmanager
def chat_page(browser: Chromium, url: str, **options: Any) -> Iterator[ChatPage]:
    """A fresh profile, not opened yet. On leaving: it reached nobody but the server, and nothing in it failed or was forbidden."""
    context = browser.new_context(**{"viewport": WIDE, **options})
    page = context.new_page()
    page.set_default_timeout(PAGE_LIMIT_MS)
    chat = ChatPage(url, context, page)

    def keep_inside(route: Route) -> None:
        parts = urlsplit(route.request.url)
        if parts.scheme in ("data", "blob") or f"{parts.scheme}://{parts.netloc}" == url:
            route.continue_()
        else:
            chat.foreign_urls.append(route.request.url)
            route.abort()

    context.route("**/*", keep_inside)
    page.on("pageerror", lambda error: chat.complaints.append(str(error)))
    page.on("dialog", lambda dialog: (chat.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("console", lambda message: chat.complaints.append(message.text) if "Content Security Policy" in message.text else None)
    try:
        yield chat
        assert chat.foreign_urls == []
        assert chat.complaints == []
    finally:
        context.close()
