"""What the gradio page sends, and what is said where gradio is missing; the page itself is tried in tests/external."""

import base64
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.contract.running import RunningServer
from vlm_server.chat_client import ChatError, ChatServer
from vlm_server.cli import main, parse
from vlm_server.examples import RED_CIRCLE
from vlm_server.gradio_page import conversation


@pytest.fixture
def picture(tmp_path: Path) -> str:
    (tmp_path / "a.png").write_bytes(base64.b64decode(RED_CIRCLE.partition(",")[2]))
    return str(tmp_path / "a.png")


def entry(role: str, *content: Any, **metadata: str) -> dict[str, Any]:
    return {"role": role, "content": list(content), "metadata": metadata or None}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def file(path: str) -> dict[str, Any]:
    return {"type": "file", "file": {"path": path}}


IMAGE = {"type": "image_url", "image_url": {"url": RED_CIRCLE}}


def test_pictures_come_before_the_question_in_every_turn(picture: str) -> None:
    history = [entry("user", file(picture)), entry("user", text("What?")), entry("assistant", text("A circle."))]

    assert conversation({"text": "Sure?", "files": [picture]}, history, " ") == [
        {"role": "user", "content": [IMAGE, text("What?")]},
        {"role": "assistant", "content": "A circle."},
        {"role": "user", "content": [IMAGE, text("Sure?")]},
    ]


def test_answers_come_back_as_they_were_written() -> None:
    history = [entry("user", text("1 < 2?")), entry("assistant", text("1 &lt; 2 &amp;amp; so on"))]

    messages = conversation({"text": "a < b", "files": []}, history, "S")

    assert [message["content"] for message in messages] == ["S", "1 < 2?", "1 < 2 &amp; so on", "a < b"]


def test_failed_and_unanswered_turns_are_left_out() -> None:
    history = [entry("user", text("a")), entry("assistant", text("error: x"), id="failed"), entry("user", text("b"))]

    assert conversation({"text": "c"}, history, None) == [{"role": "user", "content": "c"}]


def test_an_empty_question_and_a_lost_picture_are_one_line() -> None:
    with pytest.raises(ChatError, match="there is no question"):
        conversation({"text": "", "files": []}, [], None)
    with pytest.raises(ChatError, match="cannot be read"):
        conversation({"text": "x", "files": ["/no/such.png"]}, [], None)


def test_without_gradio_one_line_says_what_to_install(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    assert main(["gradio", server.url]) == 1

    [line] = capsys.readouterr().err.splitlines()
    assert "pip install 'vlm-server[gradio]'" in line


def test_both_orders_of_words_mean_the_same() -> None:
    documented = parse(["serve", "gradio", "http://x", "--server-name", "localhost", "--server-port", "6006"])

    assert documented == parse(["gradio", "http://x", "--server_name=localhost"])
    assert parse(["gradio"]).server_name == "127.0.0.1"


async def test_an_answer_of_the_event_loops_client_is_whole_and_stops_when_closed(server: RunningServer) -> None:
    chat = ChatServer(server.url)
    question = [{"role": "user", "content": "hi"}]

    whole = "".join([piece.text async for piece in chat.answer_async(server.model, question)])
    server.backend.engine.hangs_after = 3
    pieces = chat.answer_async(server.model, question)
    begun = await anext(pieces)
    await pieces.aclose()

    assert whole == "".join(piece.text for piece in chat_again(server, question))
    assert begun.finish_reason is None
    assert server.backend.activity.was_left_within(5)


def chat_again(server: RunningServer, question: list[dict[str, Any]]) -> Any:
    server.backend.engine.hangs_after = None
    return ChatServer(server.url).answer(server.model, question)


async def test_failures_of_the_event_loops_client_are_one_line(server: RunningServer) -> None:
    question = [{"role": "user", "content": "hi"}]
    server.backend.engine.fails_after = 2

    with pytest.raises(ChatError, match="the engine process ended"):
        [piece async for piece in ChatServer(server.url).answer_async(server.model, question)]
    with pytest.raises(ChatError, match=r"does not exist.*\(HTTP 404\)"):
        [piece async for piece in ChatServer(server.url).answer_async("nope", question)]
    with pytest.raises(ChatError, match="cannot be reached"):
        [piece async for piece in ChatServer("http://127.0.0.1:9").answer_async("m", question)]
