"""`vlm-server chat` as a program: through a pipe, and on a terminal with its keys."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.contract.fake_engine import DEFAULT_REPLY
from tests.contract.running import RunningServer, fake_config, running_server
from vlm_server.cli import main, parse

CLONE = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "vlm_server.cli"]


def _take_terminal() -> None:
    """Makes it the session's, so that its Ctrl-C is a signal, which a run of tests in the background may have been told to ignore."""
    os.close(os.open(os.ttyname(0), os.O_RDWR))
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Terminal:
    """A pseudo-terminal with the program on it; a test types and waits for what is shown."""

    def __init__(self, words: list[str]) -> None:
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "PYTHONPATH": str(CLONE)}
        self.process = subprocess.Popen(
            [*PROGRAM, *words], stdin=theirs, stdout=theirs, stderr=theirs, cwd=CLONE, env=environment, start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(theirs)
        self.shown = b""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, text: str) -> str:
        """What was shown up to the next occurrence of `text`, which counts as read."""
        deadline_s = time.monotonic() + 60
        while text.encode() not in self.shown:
            assert time.monotonic() < deadline_s, self.shown
            try:
                self.shown += os.read(self._ours, 4096)
            except OSError:  # the program ended
                assert text.encode() in self.shown, self.shown
        before, _, self.shown = self.shown.partition(text.encode())
        return before.decode()

    def wait_until_it_reads(self) -> None:
        """The program sleeps: Python loses a Ctrl-C that falls between the prompt that readline shows and its wait for a key."""
        deadline_s = time.monotonic() + 60
        while psutil.Process(self.process.pid).status() != psutil.STATUS_SLEEPING:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@contextmanager
def terminal(*words: str) -> Iterator[Terminal]:
    opened = Terminal(list(words))
    try:
        yield opened
    finally:
        opened.close()


def test_the_first_ctrl_c_stops_the_answer_and_the_second_one_leaves(server: RunningServer) -> None:
    server.backend.engine.hangs_after = 20
    with terminal("chat", server.url) as screen:
        screen.wait_for(f"{server.model} at {server.url}")
        screen.wait_for("double enter to end input >>> ")
        screen.type("你好\n\n")
        screen.wait_for("Hello! 你好")
        screen.type("\x03")
        screen.wait_for("(stopped; Ctrl-C again leaves)")
        screen.wait_for("double enter to end input >>> ")
        stopped = server.backend.activity.was_left_within(10)
        screen.wait_until_it_reads()
        screen.type("\x03")
        status = screen.process.wait(20)

    assert stopped
    assert status == 0
    prompt, _ = server.backend.engine.requests[-1]
    assert bytes(token_id for token_id in prompt.token_ids if token_id < 256).decode() == "user: 你好\nassistant: "


def test_a_question_through_a_pipe_is_answered(server: RunningServer) -> None:
    done = subprocess.run(
        [*PROGRAM, "serve", "api_client", server.url, "--session_id", "1", "--system", "S"],
        input="写一首诗歌".encode(), capture_output=True, timeout=60, cwd=CLONE, env={**os.environ, "PYTHONPATH": str(CLONE)}, check=True,
    )  # fmt: skip

    assert done.stdout.decode().endswith(f"\n{DEFAULT_REPLY}\n")
    assert done.stderr == b""
    prompt, _ = server.backend.engine.requests[-1]
    assert bytes(token_id for token_id in prompt.token_ids if token_id < 256).decode() == "system: S\nuser: 写一首诗歌\nassistant: "


def test_a_terminal_of_few_characters_ends_nothing(server: RunningServer) -> None:
    environment = {**os.environ, "PYTHONPATH": str(CLONE), "PYTHONIOENCODING": "ascii"}

    done = subprocess.run([*PROGRAM, "chat", server.url], input=b"\xff\xfe hi", capture_output=True, timeout=60, cwd=CLONE, env=environment)

    assert done.returncode == 0
    assert done.stdout.decode("ascii").endswith("\n" + DEFAULT_REPLY.encode("ascii", "replace").decode() + "\n")


def test_the_key_may_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with running_server(fake_config(api_keys=("secret",))) as server:
        assert main(["chat", server.url]) == 1
        assert "(HTTP 401)" in capsys.readouterr().err
        monkeypatch.setenv("VLM_SERVER_API_KEY", "secret")
        assert main(["chat", server.url, "--model", "nope"]) == 1
        assert capsys.readouterr().err == f"vlm-server: {server.url} has no model nope, only {server.model}\n"


def test_both_orders_of_words_mean_the_same() -> None:
    assert parse(["chat", "http://x", "--api-key", "k"]) == parse(["serve", "api_client", "http://x", "--api_key", "k"])
    assert parse(["chat"]).url == "http://127.0.0.1:23333"


def test_a_model_in_the_place_of_the_url_is_told_where_models_belong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "internlm/internlm2-chat-7b"]) == 1

    assert "vlm-server serve internlm/internlm2-chat-7b" in capsys.readouterr().err
