"""The chat page as a person uses it: pictures in, an answer that grows, and a history that is still there tomorrow."""

import base64
import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from engine.request import EngineDeadError
from tests.contract.fake_engine import DEFAULT_REPLY, SESSION_LEN
from tests.contract.running import RunningServer, fake_config, running_server
from tests.external.chat_page import PHONE, ChatPage, File, answers, chat_page, picture
from tests.server_process import server_process
from vision.config import VisionConfig

pytestmark = pytest.mark.external

LIMIT_S = 10
ANSWER_LIMIT_MS = 60_000
BEGINNING = "Hello!"  # of the default reply, a byte a step, before the scripted engine holds still
UNREADABLE = base64.b64decode("badbadbadbad")  # FakePipeline refuses pictures with these letters in their address


def test_drop_a_picture_ask_see_the_answer_grow_stop_it_reload_and_find_it_again(
    chat: ChatPage, scripted: RunningServer, tmp_path: Path
) -> None:
    scripted.backend.engine.hangs_after = len(BEGINNING)
    chat.drop(picture("first.png"))
    expect(chat.attachments).to_have_text(re.compile(r"first\.png"))
    chat.page.screenshot(path=tmp_path / "1-dropped.png")

    chat.ask("What is this?")
    expect(chat.answers).to_contain_text(BEGINNING)
    expect(chat.answers).to_have_attribute("aria-busy", "true")
    chat.page.screenshot(path=tmp_path / "2-growing.png")
    [(prompt, _)] = scripted.backend.engine.requests
    chat.stop_button.click()

    assert len(prompt.images) == 1
    assert scripted.backend.activity.was_left_within(LIMIT_S)  # the server stopped too
    for visit in ("before", "after"):
        expect(chat.questions).to_contain_text("What is this?")
        expect(chat.questions.get_by_role("img", name="first.png")).to_have_js_property("naturalWidth", 320)
        expect(chat.answers.locator(".markdown")).to_have_text(BEGINNING)
        expect(chat.answers).to_contain_text("Stopped")
        expect(chat.conversations).to_have_text(["What is this?"])
        chat.page.screenshot(path=tmp_path / f"3-{visit}-reload.png")
        if visit == "before":
            chat.page.reload()
    chat.open()  # also without the conversation in the address
    chat.conversations.get_by_role("button", name="What is this?", exact=True).click()
    expect(chat.answers).to_contain_text("Stopped")


KEPT_TURNS = """async (text) => {
  const done = (request) => new Promise((resolve) => (request.onsuccess = () => resolve(request.result)));
  const database = await done(indexedDB.open("vlm-server.chat"));
  for (;;) {
    const [{ turns }] = await done(database.transaction("conversations").objectStore("conversations").getAll());
    if (turns.at(-1).text === text) return turns;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}"""


def test_a_page_that_is_left_in_the_middle_keeps_what_was_there(chat: ChatPage, scripted: RunningServer) -> None:
    scripted.backend.engine.hangs_after = len(BEGINNING)
    chat.ask("Go on")
    expect(chat.answers).to_contain_text(BEGINNING)
    kept = [turn["text"] for turn in chat.page.evaluate(KEPT_TURNS, BEGINNING)]  # written down every second

    chat.page.reload()

    assert kept == ["Go on", BEGINNING]

    expect(chat.answers).to_contain_text("Stopped")
    expect(chat.answers.locator(".markdown")).to_have_text(BEGINNING)
    assert scripted.backend.activity.was_left_within(LIMIT_S)


HOSTILE = """<script>alert(1)</script><img src=x onerror=alert(2)> <b>bold?</b>

<iframe src="/metrics"></iframe>

**real bold** and `<i>code</i>` &lt;u&gt; [run](javascript:alert(3)) [data](data:text/html,x) [near](/metrics) [far](https://far.example/x)
![alt <b>text</b>](https://pictures.example/track.png) <style>body{display:none}</style>

<form action="https://evil.example"><input name=q></form>"""


def test_html_in_an_answer_stays_text_and_loads_nothing(chat: ChatPage, scripted: RunningServer, tmp_path: Path) -> None:
    answers(scripted, HOSTILE)
    chat.ask("Be hostile")
    chat.answered()
    chat.page.screenshot(path=tmp_path / "hostile.png")

    shown = chat.answers.locator(".markdown")
    for text in (
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(2)>",
        "<b>bold?</b>",
        '<iframe src="/metrics"></iframe>',
        "<form action=",
    ):
        expect(shown).to_contain_text(text)
    expect(shown.locator("script, img, iframe, b, i, u, style, form, input, object, [onerror], [style]")).to_have_count(0)
    expect(shown.locator("strong")).to_have_text("real bold")
    expect(shown.locator("code")).to_have_text("<i>code</i>")
    links = shown.locator("a")
    assert [(link.inner_text(), link.get_attribute("href")) for link in links.all()] == [
        ("far", "https://far.example/x"),
        ("alt <b>text</b>", "https://pictures.example/track.png"),
        ("https://evil.example", "https://evil.example"),  # of the form: an address in a text
    ]
    for link in links.all():
        assert (link.get_attribute("target"), link.get_attribute("rel")) == ("_blank", "noopener noreferrer nofollow")


def test_what_slips_through_is_still_forbidden_to_run_or_to_load(chat: ChatPage) -> None:
    page = chat.context.new_page()  # one whose complaints are expected
    page.goto(f"{chat.url}/ui")

    blocked = page.evaluate("""async () => {
      const found = [];
      document.addEventListener("securitypolicyviolation", (event) => found.push(event.effectiveDirective));
      const add = (tag, properties) => document.body.append(Object.assign(document.createElement(tag), properties));
      add("img", { src: "https://pictures.example/x.png" });
      add("iframe", { src: "https://frames.example/" });
      add("style", { textContent: "body { display: none }" });
      await fetch("https://other.example/").catch(() => {});
      try { document.body.innerHTML += "<p>"; } catch (error) { found.push(error.name); }
      try { add("script", { textContent: "window.hasRun = true" }); } catch (error) { found.push(error.name); }
      while (!["img-src", "frame-src"].every((name) => found.includes(name))) await new Promise((resolve) => setTimeout(resolve, 10));
      return [found, window.hasRun, getComputedStyle(document.body).display];
    }""")

    assert {"img-src", "frame-src", "style-src-elem", "connect-src", "TypeError"} <= set(blocked[0])
    assert blocked[1:] == [None, "grid"]


MARKDOWN = """# Title

1. *one*
2. two

- [x] item

| a | b |
|--:|:-:|
| 1 | 2 |

```python
print("a very long line " * 20)  # a very long line a very long line a very long line a very long line a very long line a very long line
```

> quote

https://plain.example/address"""


def test_markdown_is_shown_as_such_and_code_can_be_copied(chat: ChatPage, scripted: RunningServer) -> None:
    answers(scripted, MARKDOWN)
    chat.context.grant_permissions(["clipboard-read", "clipboard-write"])
    chat.ask("Write")
    chat.answered()

    shown = chat.answers.locator(".markdown")
    for selector, text in (("h1", "Title"), ("ol em", "one"), ("ul li", "[x] item"), ("blockquote", "quote"), ("td.align-center", "2")):
        expect(shown.locator(selector)).to_have_text(text)
    expect(shown.locator("td.align-right")).to_have_css("text-align", "right")
    expect(shown.get_by_role("link")).to_have_attribute("href", "https://plain.example/address")
    shown.get_by_role("button", name="Copy code").click()
    expect(shown.get_by_role("button", name="Copy code").locator("use")).to_have_attribute("href", "#icon-check")
    assert chat.page.evaluate("navigator.clipboard.readText()").startswith("print(")
    chat.answers.get_by_role("button", name="Copy the answer").click()
    expect(chat.answers.get_by_role("button", name="Copy the answer").locator("use")).to_have_attribute("href", "#icon-check")
    assert chat.page.evaluate("navigator.clipboard.readText()") == MARKDOWN


def test_several_pictures_by_drop_paste_and_choice_are_sent_in_order_and_can_be_removed(chat: ChatPage, scripted: RunningServer) -> None:
    dropped, pasted = (
        [picture(f"dropped-{number}.png", color=color) for number, color in enumerate(("red", "green"))],
        picture("pasted.png"),
    )
    chat.drop(*dropped)
    chat.paste(pasted)
    chat.choose(picture("wrong.png", color="black"), picture("chosen.png", color="blue"))
    chat.page.get_by_role("button", name="Remove wrong.png").click()
    names = ["dropped-0.png", "dropped-1.png", "pasted.png", "chosen.png"]
    expect(chat.attachments.get_by_role("img")).to_have_count(4)
    assert [image.get_attribute("alt") for image in chat.attachments.get_by_role("img").all()] == names

    chat.ask("All four")
    chat.answered()
    chat.ask("And one more", picture("later.png", color="gold"))
    chat.answered()

    expect(chat.questions.get_by_role("img")).to_have_count(5)
    assert [image.get_attribute("alt") for image in chat.questions.get_by_role("img").all()] == [*names, "later.png"]
    first, second = (prompt for prompt, _ in scripted.backend.engine.requests)
    sent = [image.content_hash.decode() for image in first.images]
    expected = [*dropped, pasted, picture("chosen.png", color="blue")]
    assert sent == [f"data:image/png;base64,{base64.b64encode(file.content).decode()}" for file in expected]
    assert [image.content_hash for image in second.images[:4]] == [image.content_hash for image in first.images]
    assert len(second.images) == 5
    text = bytes(token_id for token_id in second.token_ids if token_id < 256).decode()
    assert text == f"user: All four\nassistant: {DEFAULT_REPLY}\nuser: And one more\nassistant: "


def test_a_picture_alone_is_a_message(chat: ChatPage, scripted: RunningServer) -> None:
    chat.choose(picture("alone.png"))
    chat.page.get_by_role("button", name="Send").click()
    chat.answered()

    assert len(scripted.backend.engine.requests) == 1
    expect(chat.conversations).to_have_text(["alone.png"])


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (File("notes.txt", "text/plain", b"no picture"), "“notes.txt” is not a picture that can be sent, only JPEG, PNG, GIF, WebP"),
        (File("drawing.svg", "image/svg+xml", b"<svg/>"), "“drawing.svg” is not a picture that can be sent"),
        (File("broken.png", "image/png", b"\x89PNG no more"), "“broken.png” cannot be read as a picture."),
        (picture("heavy.png", ending=b"x" * 60_000), "the server takes pictures up to 50 KB."),
        (picture("large.png", size=(1100, 1000)), "“large.png” has 1 million pixels; the server takes pictures up to 1 million pixels."),
    ],
    ids=lambda value: value.name if isinstance(value, File) else "",
)  # fmt: skip
def test_what_cannot_be_sent_is_refused_with_its_name_and_what_was_written_stays(browser_program: Browser, file: File, words: str) -> None:
    config = fake_config(vision=VisionConfig(max_picture_bytes=50 << 10, max_picture_pixels=1_000_000))
    with running_server(config) as server, chat_page(browser_program, server.url) as chat:
        with chat.page.expect_response("**/ui/limits.json"):
            chat.open()
        chat.message.fill("A question")
        chat.drop(file, picture("good.png"))

        expect(chat.page.get_by_role("alert").filter(has_text=words)).to_be_visible()
        expect(chat.attachments).to_have_text(re.compile("good"))
        expect(chat.message).to_have_value("A question")
        chat.page.get_by_role("button", name="Dismiss").click()
        expect(chat.page.locator(".notice")).to_have_count(0)


def test_a_request_over_the_servers_limit_is_not_sent(browser_program: Browser) -> None:
    with running_server(fake_config(max_body_bytes=2000)) as server, chat_page(browser_program, server.url) as chat:
        with chat.page.expect_response("**/ui/limits.json"):
            chat.open()
        chat.ask("Too much", picture(ending=b"x" * 3000))

        expect(chat.answers.get_by_role("alert")).to_contain_text("the server takes up to 2 KB. Start a new chat")
        assert server.backend.engine.requests == []


NUM_KEPT_PICTURES = """async () => {
  const done = (request) => new Promise((resolve) => (request.onsuccess = () => resolve(request.result)));
  const database = await done(indexedDB.open("vlm-server.chat"));
  return done(database.transaction("pictures").objectStore("pictures").count());
}"""


def unreadable_picture(name: str) -> File:
    """A browser shows it, the scripted pipeline refuses it."""
    padding = b"\0" * (-len(picture(color="pink").content) % 3)  # so that the letters stand whole in its address
    return picture(name, color="pink", ending=padding + UNREADABLE)


def test_an_error_about_a_picture_names_it_and_the_message_can_be_edited(chat: ChatPage, scripted: RunningServer) -> None:
    chat.ask("Hello")
    chat.answered()
    chat.ask("Look", picture("good.png"), unreadable_picture("odd.png"))
    expect(chat.answers.last.get_by_role("alert")).to_have_text("Picture “odd.png”: not a picture")
    expect(chat.page.get_by_role("button", name="Try again")).to_be_visible()

    chat.questions.last.hover()
    chat.questions.last.get_by_role("button", name="Edit this message").click()
    expect(chat.message).to_have_value("Look")
    expect(chat.page.get_by_text("Editing: sending replaces this message")).to_be_visible()
    chat.page.get_by_role("button", name="Remove odd.png").click()
    chat.ask("Look again")
    chat.answered()

    expect(chat.questions).to_have_count(2)
    expect(chat.questions.last).to_contain_text("Look again")
    expect(chat.questions.last.get_by_role("img")).to_have_count(1)
    expect(chat.answers.last).to_contain_text(DEFAULT_REPLY)
    assert len(scripted.backend.engine.requests[-1][0].images) == 1
    assert chat.page.evaluate(NUM_KEPT_PICTURES) == 1  # the other one's bytes are gone too


def test_a_refused_question_can_be_tried_again(chat: ChatPage, scripted: RunningServer) -> None:
    scripted.backend.engine.refusal = EngineDeadError("the engine is restarting")
    chat.ask("Are you there?")
    expect(chat.answers.get_by_role("alert")).to_have_text("The engine is restarting")

    scripted.backend.engine.refusal = None
    chat.page.get_by_role("button", name="Try again").click()
    chat.answered()

    expect(chat.questions).to_have_count(1)
    expect(chat.answers.locator(".markdown")).to_have_text([DEFAULT_REPLY])
    expect(chat.page.get_by_role("alert")).to_have_text([""])


def test_an_answer_that_breaks_off_keeps_its_text_and_says_why(chat: ChatPage, scripted: RunningServer) -> None:
    scripted.backend.engine.fails_after = len(BEGINNING)
    chat.ask("Break off")

    expect(chat.answers.get_by_role("alert")).to_have_text("The engine process ended")
    expect(chat.answers.locator(".markdown")).to_have_text(BEGINNING)


def test_a_server_that_is_gone_is_said_to_be(chat: ChatPage) -> None:
    chat.page.route("**/v1/chat/completions", lambda route: route.abort())
    chat.ask("Anyone?")

    expect(chat.answers.get_by_role("alert")).to_have_text("The server cannot be reached.")


def test_a_server_that_was_away_is_found_again_and_waiting_for_it_can_be_stopped(browser_program: Browser, scripted: RunningServer) -> None:
    with chat_page(browser_program, scripted.url) as chat:
        chat.page.route("**/v1/models", lambda route: route.abort())
        chat.page.goto(f"{scripted.url}/ui")
        expect(chat.page.get_by_role("combobox", name="Model")).to_have_text("Not connected")
        chat.page.unroute("**/v1/models")
        chat.page.route("**/v1/models", lambda route: None)  # never answered
        chat.ask("Hello?")
        chat.stop_button.click()
        expect(chat.answers).to_contain_text("Stopped before the first token")
        chat.page.unroute("**/v1/models")

        chat.page.get_by_role("button", name="Answer again").click()
        chat.answered()

        expect(chat.answers.locator(".markdown")).to_have_text([DEFAULT_REPLY])
        expect(chat.page.get_by_role("combobox", name="Model")).to_have_value(scripted.model)


def test_the_cost_of_an_answer_is_shown_with_every_stage(chat: ChatPage) -> None:
    chat.ask("How long?", picture())
    chat.answered()

    summary = chat.answers.locator("summary")
    expect(summary).to_contain_text(f"{len(DEFAULT_REPLY.encode()) + 1} tokens")
    expect(summary).to_contain_text(re.compile(r"[\d.]+ tokens/s · first after [\d.]+ m?s"))
    summary.focus()
    summary.press("Enter")
    rows = [row.inner_text().split("\n") for row in chat.answers.locator("dl > div").all()]
    stages = {row[0]: row[-1] for row in rows}
    assert list(stages) == [
        *("Upload and network", "Pictures", "Template and tokenizer", "Queue", "Vision encoder", "Prefill, to the first token"),
        *("Generation", "Prompt4 for pictures, 2 cached", "Answer"),
    ]  # fmt: skip
    assert [stages[name] for name in list(stages)[1:6]] == ["250 ms", "3.0 ms", "3.0 ms", "500 ms", "125 ms"]


def test_sampling_and_system_message_are_sent_and_survive_a_reload(chat: ChatPage, scripted: RunningServer) -> None:
    fields = {"Temperature": "0.5", "Top p": "0.9", "Top k": "7", "Max tokens": "6", "Seed": "42"}
    chat.page.get_by_role("button", name="Settings").click()
    for name, value in fields.items():
        chat.page.get_by_label(name).fill(value)
    chat.page.get_by_label("System message").fill("Be brief.")
    chat.page.get_by_role("button", name="Done").click()

    chat.page.reload()
    chat.ask("Hello")
    chat.answered()
    prompt, params = scripted.backend.engine.requests[-1]
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens, params.seed) == (0.5, 0.9, 7, 6, 42)
    assert bytes(prompt.token_ids[1:]).decode() == "system: Be brief.\nuser: Hello\nassistant: "
    expect(chat.answers).to_contain_text("Cut off at the limit of tokens")

    chat.page.get_by_role("button", name="Settings").click()
    chat.page.get_by_label("Temperature").fill("3")
    expect(chat.page.get_by_label("Temperature")).to_have_attribute("aria-invalid", "true")
    chat.page.get_by_role("button", name="Reset").click()
    expect(chat.page.get_by_label("Temperature")).to_have_value("")
    chat.page.keyboard.press("Escape")
    chat.ask("And now?")
    chat.answered()
    _, params = scripted.backend.engine.requests[-1]
    assert (params.temperature, params.top_k, params.max_tokens, params.seed) == (1.0, 0, None, None)


def test_conversations_are_listed_renamed_deleted_and_go_on_while_another_is_read(chat: ChatPage, scripted: RunningServer) -> None:
    chat.ask("The first")
    chat.answered()
    scripted.backend.engine.hangs_after = len(BEGINNING)
    chat.page.get_by_role("button", name="New chat").click()
    chat.ask("The second")
    expect(chat.answers).to_contain_text(BEGINNING)
    expect(chat.conversations).to_have_text(["The second", "The first"])

    chat.conversations.get_by_role("button", name="The first", exact=True).click()
    expect(chat.answers.locator(".markdown")).to_have_text([DEFAULT_REPLY])
    expect(chat.stop_button).to_be_hidden()
    chat.page.go_back()
    expect(chat.answers).to_have_attribute("aria-busy", "true")
    chat.page.keyboard.press("Escape")
    expect(chat.answers).to_contain_text("Stopped")

    chat.conversations.nth(1).hover()
    chat.page.get_by_role("button", name="Rename The first").click()
    chat.page.get_by_label("Name of the conversation").fill("  Renamed ")
    chat.page.get_by_label("Name of the conversation").press("Enter")
    expect(chat.conversations).to_have_text(["The second", "Renamed"])
    chat.conversations.nth(0).hover()
    chat.page.get_by_role("button", name="Delete The second").click()
    chat.page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(chat.conversations).to_have_count(2)
    expect(chat.page.get_by_role("button", name="Delete The second")).to_be_focused()
    chat.page.keyboard.press("Enter")
    chat.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(chat.conversations).to_have_text(["Renamed"])
    expect(chat.page.get_by_role("heading", name="Ask about a picture")).to_be_visible()
    chat.page.reload()
    expect(chat.conversations).to_have_text(["Renamed"])


def test_deleting_a_conversation_that_is_being_answered_ends_the_answer(chat: ChatPage, scripted: RunningServer) -> None:
    scripted.backend.engine.hangs_after = len(BEGINNING)
    chat.ask("Forget this", picture())
    expect(chat.answers).to_contain_text(BEGINNING)

    chat.conversations.hover()
    chat.page.get_by_role("button", name="Delete Forget this").click()
    chat.page.get_by_role("dialog").get_by_role("button", name="Delete").click()

    assert scripted.backend.activity.was_left_within(LIMIT_S)
    expect(chat.conversations).to_have_count(0)
    chat.page.reload()
    expect(chat.page.get_by_role("heading", name="Ask about a picture")).to_be_visible()
    expect(chat.conversations).to_have_count(0)


@pytest.mark.parametrize(
    "fault",
    [
        "Object.defineProperty(window, 'indexedDB', { get() { throw new DOMException('no', 'SecurityError'); } })",
        "indexedDB.open = () => { throw new Error('no'); }",
        "IDBObjectStore.prototype.put = () => { throw new DOMException('full', 'QuotaExceededError'); }",
        "for (const name of ['localStorage', 'sessionStorage']) Object.defineProperty(window, name, { get() { throw new Error('no'); } });"
        "indexedDB.open = () => { throw new Error('no'); }",
    ],
    ids=["forbidden", "broken", "full", "no storage at all"],
)
def test_without_storage_the_chat_works_and_says_that_it_will_be_forgotten(chat: ChatPage, fault: str) -> None:
    chat.page.add_init_script(fault)
    chat.page.reload()
    for text in ("One", "Two"):
        chat.ask(text, picture())
        chat.answered()

    expect(chat.answers.locator(".markdown")).to_have_text([DEFAULT_REPLY] * 2)
    expect(chat.questions.get_by_role("img")).to_have_count(2)
    expect(chat.conversations).to_have_text(["One"])
    expect(chat.page.get_by_text("Conversations are lost when this page is closed")).to_be_visible()


def test_a_key_is_asked_for_and_kept_as_long_as_it_was_said(browser_program: Browser) -> None:
    with running_server(fake_config(api_keys=("right",))) as server, chat_page(browser_program, server.url) as chat:
        chat.page.goto(f"{server.url}/ui")
        dialog = chat.page.get_by_role("dialog", name="API key")
        expect(dialog).to_contain_text("This server answers with an API key only.")
        dialog.get_by_label("Key", exact=True).fill("wrong")
        dialog.get_by_label("Key", exact=True).press("Enter")
        expect(dialog).to_contain_text("This server does not know that key.")
        dialog.get_by_label("Key", exact=True).fill("right")
        dialog.get_by_role("button", name="Use key").click()
        chat.ask("Let me in")
        chat.answered()
        expect(chat.answers).to_contain_text(DEFAULT_REPLY)
        stored = "[sessionStorage, localStorage].map((storage) => storage.getItem('vlm-server.api-key'))"
        assert chat.page.evaluate(stored) == ["right", None]
        chat.page.reload()
        expect(chat.page.get_by_role("combobox", name="Model")).to_be_enabled()

        chat.page.get_by_role("button", name="Settings").click()
        chat.page.get_by_role("button", name="API key…").click()
        dialog.get_by_label("Key", exact=True).fill("right")
        dialog.get_by_label("Remember it in this browser").check()
        dialog.get_by_role("button", name="Use key").click()
        expect(dialog).to_be_hidden()
        chat.page.wait_for_function(f"JSON.stringify({stored}) === '[null,\"right\"]'")
        other_tab = chat.context.new_page()
        other_tab.goto(f"{server.url}/ui")
        expect(other_tab.get_by_role("combobox", name="Model")).to_be_enabled()


def test_a_key_that_is_not_given_leaves_a_question_that_can_be_tried_again(browser_program: Browser) -> None:
    with running_server(fake_config(api_keys=("right",))) as server, chat_page(browser_program, server.url) as chat:
        chat.page.goto(f"{server.url}/ui")
        chat.page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        chat.ask("Locked out?")
        chat.page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        expect(chat.answers.get_by_role("alert")).to_contain_text("API keys")

        chat.page.get_by_role("button", name="Try again").click()
        chat.page.get_by_role("dialog").get_by_label("Key", exact=True).fill("right")
        chat.page.get_by_role("dialog").get_by_role("button", name="Use key").click()
        chat.answered()

        expect(chat.answers).to_contain_text(DEFAULT_REPLY)


def test_behind_a_prefix_everything_is_found(browser_program: Browser) -> None:
    with running_server(fake_config(root_path="/vlm")) as server, chat_page(browser_program, server.url) as chat:
        asked: list[str] = []
        chat.page.on("request", lambda request: asked.append(request.url.removeprefix(server.url)))
        chat.open("/vlm/ui/")
        chat.page.get_by_role("button", name="Try it with an example picture").click()
        chat.page.get_by_role("button", name="Send").click()
        chat.answered()

        expect(chat.answers).to_contain_text(DEFAULT_REPLY)
        assert {"/vlm/v1/models", "/vlm/v1/chat/completions", "/vlm/ui/example.png"} <= set(asked)
        assert all(path.startswith("/vlm/ui") or path.startswith(("/vlm/v1/", "blob:")) for path in asked), asked


def test_a_prompt_over_the_window_is_explained(chat: ChatPage) -> None:
    chat.ask("x" * SESSION_LEN)

    expect(chat.answers.get_by_role("alert")).to_contain_text(f"at most {SESSION_LEN}")


def test_the_embedded_model_describes_the_example_picture(browser_program: Browser, tmp_path: Path) -> None:
    with server_process() as server, chat_page(browser_program, server.url, viewport=PHONE) as chat:
        chat.open()
        chat.page.get_by_role("button", name="Try it with an example picture").click()
        expect(chat.attachments).to_have_count(1)
        chat.page.get_by_role("button", name="Send").click()
        expect(chat.stop_button).to_be_hidden(timeout=ANSWER_LIMIT_MS)
        expect(chat.answers).to_have_attribute("aria-busy", "false", timeout=ANSWER_LIMIT_MS)
        chat.answers.locator("summary").click()
        chat.page.screenshot(path=tmp_path / "embedded.png")

        expect(chat.answers.locator(".markdown")).to_contain_text(re.compile("red", re.IGNORECASE))
        for stage in ("Pictures", "Vision encoder", "Prefill", "Generation"):
            expect(chat.answers.locator("dt").filter(has_text=re.compile(f"^{stage}"))).to_be_visible()
        expect(chat.answers.locator("dt").filter(has_text="Prompt")).to_contain_text("for pictures")
