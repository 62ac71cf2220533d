"""The terminal's chat over a scripted server: what is asked, what is shown, what is remembered."""

import base64
import io
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from engine.request import EngineDeadError
from tests.contract.fake_engine import DEFAULT_REPLY
from tests.contract.running import RunningServer, fake_config, running_server
from vlm_server.chat_client import MAX_PICTURE_BYTES, ChatError, ChatServer, Piece
from vlm_server.examples import RED_CIRCLE
from vlm_server.terminal import TerminalChat

PNG = base64.b64decode(RED_CIRCLE.partition(",")[2])


class Keyboard:
    """Types the lines of a text, then the input ends."""

    def __init__(self, text: str) -> None:
        self._lines = iter(text.splitlines())

    def __call__(self, prompt: str) -> str:
        try:
            return next(self._lines)
        except StopIteration:
            raise EOFError from None


class Scripted:
    """Answers with the given pieces, or raises what stands among them; keeps what it was asked."""

    def __init__(self, *pieces: Piece | str | BaseException) -> None:
        self.pieces = pieces
        self.asked: list[list[dict[str, Any]]] = []
        self.sampling: dict[str, float | None] = {}
        self.was_closed = False

    def answer(self, model: str, messages: list[dict[str, Any]], **sampling: float | None) -> Generator[Piece, None, None]:
        self.asked.append(messages)
        self.sampling = sampling
        try:
            for piece in self.pieces:
                if isinstance(piece, BaseException):
                    raise piece
                yield Piece(piece) if isinstance(piece, str) else piece
        finally:
            self.was_closed = True


def chat(server: Any, typed: str, **options: Any) -> tuple[str, TerminalChat]:
    """What is shown after the first line, and the chat."""
    output = io.StringIO()
    talk = TerminalChat(server, "m", read_line=Keyboard(typed), output=output, **options)
    talk.run()
    return output.getvalue().partition("\n")[2], talk


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_an_empty_line_sends_and_the_history_goes_along() -> None:
    server = Scripted("Hel", "lo.")

    shown, talk = chat(server, "hi\nthere\n\nand\n\n")

    assert server.asked == [[user("hi\nthere")], [user("hi\nthere"), assistant("Hello."), user("and")]]
    assert shown == "\nHello.\n\nHello.\n"
    assert talk.history[-1] == assistant("Hello.")


def test_end_begins_anew_with_the_system_text_and_exit_leaves() -> None:
    server = Scripted("ok")

    shown, talk = chat(server, "a\n\n  end \n\nb\n\nexit\n\nnever\n\n", system="Be brief.", sampling={"temperature": 0.5})

    opening = {"role": "system", "content": "Be brief."}
    assert server.asked == [[opening, user("a")], [opening, user("b")]]
    assert server.sampling == {"temperature": 0.5}
    assert "(a new conversation)" in shown
    assert talk.history == [opening, user("b"), assistant("ok")]


def test_the_words_are_commands_only_alone() -> None:
    server = Scripted("ok")

    chat(server, "the\nend\n\nexit\nnow\n\n")

    assert [messages[-1]["content"] for messages in server.asked] == ["the\nend", "exit\nnow"]


def test_lines_without_text_are_not_sent_and_the_last_lines_need_no_empty_one() -> None:
    server = Scripted("ok")

    chat(server, "\n\n   \n\nlast")

    assert server.asked == [[user("last")]]


def test_pictures_stand_where_their_lines_stand(tmp_path: Path) -> None:
    (tmp_path / "my picture.png").write_bytes(PNG)
    server = Scripted("ok")

    chat(
        server,
        f"First:\n/image '{tmp_path / 'my picture.png'}'\nor\n/image https://example.org/b.jpg\n\n/image data:image/png;base64,AA==\n\n",
    )

    def picture(url: str) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": url}}

    first = [{"type": "text", "text": "First:"}, picture(RED_CIRCLE), {"type": "text", "text": "or"}, picture("https://example.org/b.jpg")]
    assert server.asked[0] == [user(first)]
    assert server.asked[1][-1] == user([picture("data:image/png;base64,AA==")])


def unreadable(folder: Path) -> dict[str, tuple[str, str]]:
    (folder / "empty.png").touch()
    with open(folder / "large.png", "wb") as file:
        file.truncate(MAX_PICTURE_BYTES + 1)
    os.mkfifo(folder / "pipe.png")
    return {
        "missing": (f"{folder}/no.png", "No such file"),
        "a folder": (f"{folder}", "is no file"),
        "a pipe": (f"{folder}/pipe.png", "is no file"),
        "a device": ("/dev/zero", "is no file"),
        "empty": (f"{folder}/empty.png", "is empty"),
        "large": (f"{folder}/large.png", "20 MiB; a picture may have 20"),
        "a null": ("a\0b", "cannot be read"),
        "nothing": ("", "/image needs a path or a URL"),
    }


def test_a_picture_that_cannot_be_sent_is_one_line_and_the_question_is_not_sent(tmp_path: Path) -> None:
    for name, complaint in unreadable(tmp_path).values():
        server = Scripted("ok")

        shown, talk = chat(server, f"/image {name}\nWhat is this?\n\n")

        assert server.asked == []
        assert talk.history == []
        [line] = shown.strip().splitlines()
        assert line.startswith("error: ")
        assert complaint in line


def test_a_failed_turn_is_forgotten() -> None:
    server = Scripted("Half an ans", ChatError("the engine\nended"))

    shown, talk = chat(server, "hi\n\n")

    assert shown == "\nHalf an ans\nerror: the engine ended\n"
    assert talk.history == []


def test_ctrl_c_stops_the_answer_and_what_was_read_is_remembered() -> None:
    server = Scripted("One, two", KeyboardInterrupt())

    shown, _ = chat(server, "count\n\ngo on\n\n")

    assert server.was_closed
    assert shown.startswith("\nOne, two (stopped; Ctrl-C again leaves)\n")
    assert server.asked[1] == [user("count"), assistant("One, two"), user("go on")]


def test_ctrl_c_before_the_first_word_forgets_the_turn() -> None:
    _, talk = chat(Scripted(KeyboardInterrupt()), "count\n\n")

    assert talk.history == []


def test_ctrl_c_where_a_line_is_read_leaves() -> None:
    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    TerminalChat(Scripted(), "m", read_line=interrupted, output=io.StringIO()).run()


def test_a_models_thoughts_are_shown_and_not_remembered() -> None:
    shown, talk = chat(Scripted(Piece(reasoning="Hm"), Piece(reasoning="m."), Piece("Yes"), Piece(".")), "Really?\n\n")

    assert shown == "\nHmm.\n\nYes.\n"
    assert talk.history[-1] == assistant("Yes.")


def test_an_answer_that_was_cut_off_says_so() -> None:
    shown, talk = chat(Scripted("One", Piece("", finish_reason="length")), "count\n\n")

    assert shown == "\nOne (cut off: the limit of tokens is reached)\n"
    assert talk.history[-1] == assistant("One")


def test_an_answer_cannot_command_the_terminal() -> None:
    shown, talk = chat(Scripted("a\x1b]0;title\x07b\r\nc\td\x9b2J"), "hi\n\n")

    assert shown == "\na␛]0;title␇b\nc\td␡2J\n"
    assert talk.history[-1] == assistant("a\x1b]0;title\x07b\r\nc\td\x9b2J")


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), min_size=1), st.sampled_from(["utf-8", "ascii", "gbk"])
)
def test_any_text_is_shown_on_any_terminal(pieces: list[str], encoding: str) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace", newline="")

    TerminalChat(Scripted(*pieces), "m", read_line=Keyboard("hi\n\n"), output=terminal).run()

    shown = terminal.buffer.getvalue()  # type: ignore[attr-defined]
    assert shown.endswith(f"\n{''.join(pieces)}\n".encode(encoding, "replace"))


# --- Over HTTP -------------------------------------------------------------------------------------------------------------------------


def real_chat(server: RunningServer, typed: str, **options: Any) -> tuple[str, TerminalChat]:
    output = io.StringIO()
    talk = TerminalChat(ChatServer(server.url), server.model, read_line=Keyboard(typed), output=output, **options)
    talk.run()
    return output.getvalue().partition("\n")[2], talk


def test_an_answer_arrives_whole_however_its_characters_are_cut(server: RunningServer) -> None:
    shown, _ = real_chat(server, "hi\n\n")

    assert shown == f"\n{DEFAULT_REPLY}\n"


def test_sampling_and_pictures_reach_the_engine(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)

    real_chat(server, f"/image {tmp_path / 'a.png'}\nWhat?\n\n", sampling={"temperature": 0.25, "top_p": 0.5, "max_tokens": 7})

    prompt, params = server.backend.engine.requests[-1]
    assert [image.content_hash for image in prompt.images] == [RED_CIRCLE.encode()]
    assert (params.temperature, params.top_p, params.max_tokens) == (0.25, 0.5, 7)


def test_what_the_server_refuses_is_one_line(server: RunningServer) -> None:
    shown, talk = real_chat(server, "hi\n\n", sampling={"temperature": 3})

    assert shown.strip() == "error: temperature: Input should be less than or equal to 2 (HTTP 400)"
    assert talk.history == []


def test_an_engine_that_dies_in_the_middle_is_one_line(server: RunningServer) -> None:
    server.backend.engine.fails_after = 4

    shown, talk = real_chat(server, "hi\n\n")

    assert shown.startswith("\nHel")
    assert shown.splitlines()[-1] == "error: the engine process ended"
    assert talk.history == []


def test_an_engine_that_is_dead_is_one_line(server: RunningServer) -> None:
    server.backend.engine.refusal = EngineDeadError("the engine is starting")

    assert real_chat(server, "hi\n\n")[0].strip() == "error: the engine is starting (HTTP 503)"


def test_closing_the_answer_stops_the_engine(server: RunningServer) -> None:
    server.backend.engine.hangs_after = 3
    pieces = ChatServer(server.url).answer(server.model, [user("hi")])

    assert "".join(piece.text for _, piece in zip(range(3), pieces, strict=False))
    pieces.close()

    assert server.backend.activity.was_left_within(5)


def test_the_server_is_asked_for_its_models(server: RunningServer) -> None:
    asked = ChatServer(f"{server.url}/v1/")

    assert asked.chosen_model(None) == asked.chosen_model(server.model) == server.model
    with pytest.raises(ChatError, match=f"has no model nope, only {server.model}"):
        asked.chosen_model("nope")


def test_the_key_is_sent() -> None:
    with running_server(fake_config(api_keys=("secret",))) as server:
        assert ChatServer(server.url, "secret").models() == [server.model]
        with pytest.raises(ChatError, match=r"\(HTTP 401\)$"):
            ChatServer(server.url, "wrong").models()


def test_what_is_no_server_is_one_line(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("127.0.0.1:1", "/models/internlm", "ftp://x", "http://"):
        with pytest.raises(ChatError, match="a server's URL is needed"):
            ChatServer(url)
    with pytest.raises(ChatError, match="cannot be reached: is the server running"):
        ChatServer("http://127.0.0.1:9").models()
    with pytest.raises(ChatError, match=r"not found \(HTTP 404\)"):
        ChatServer(f"{server.url}/health").models()

    def slow(*args: object, **kwargs: object) -> None:
        raise requests.ReadTimeout

    monkeypatch.setattr(requests, "get", slow)
    with pytest.raises(ChatError, match="did not answer in time"):
        ChatServer(server.url).models()
