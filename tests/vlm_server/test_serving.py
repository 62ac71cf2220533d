"""The server process: what it prints, when it is ready, how it ends."""

import asyncio
import contextlib
import errno
import http.client
import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import pytest
import requests
import trustme

from tests.contract.fake_engine import FakeBackend
from tests.contract.running import fake_config
from vlm_server.backend import Backend
from vlm_server.readiness import DRAINING, Readiness
from vlm_server.serving import LEAVING_S, ProgressLine, _allow_descriptors, _listener, _Server
from vlm_server.sessions.opening import MEMORY, open_store

SCRIPTED = """
import asyncio, contextlib, gc, os, signal, sys
import vlm_server.serving as serving
from engine.request import EngineDeadError
from tests.contract.fake_engine import FakeBackend

def open_backend(config, *, on_progress):
    on_progress(0.5)
    on_progress(1.0)
    if os.environ.get("FAILS"):
        raise EngineDeadError("no weights of lm_head", is_final=True)
    if os.environ.get("HUNG_UP"):
        os.kill(os.getpid(), signal.SIGHUP)
    backend = FakeBackend()
    if os.environ.get("HANGS"):
        backend.engine.hangs_after = 1
    if os.environ.get("LOOKS_UP"):  # a thread that nobody can end
        import threading
        asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)
    if os.environ.get("WAITS"):  # the engine goes on when a line comes
        backend.engine.gate = Gate()
    return backend.open(config)

class Gate:
    async def __call__(self):
        await asyncio.to_thread(sys.stdin.readline)

signal.signal(signal.SIGUSR1, lambda *_: print("spared", gc.get_freeze_count(), "of", len(gc.get_objects()), file=sys.stderr, flush=True))
serving.open_backend = open_backend
from vlm_server.cli import main
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def serve_process(folder: Path, *words: str, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """`vlm-server serve` over the scripted engine, in its own process."""
    (folder / "config.json").write_text('{"max_position_embeddings": 512}')
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPTED, "serve", str(folder), "--server-port", "0", "--session-store", "memory", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def test_one_line_says_when_it_is_ready_and_where(tmp_path: Path) -> None:
    with serve_process(tmp_path, "--server-name", "127.0.0.1", "--model-name", "tiny") as process:
        assert process.stdout
        line = process.stdout.readline()

        url = next(word for word in line.split() if word.startswith("http"))
        assert "tiny" in line
        assert requests.get(f"{url}/v1/models", timeout=5).json()["data"][0]["id"] == "tiny"
        assert f"(chat at {url}/ui, API at {url}/v1, docs at {url}/)" in line
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=10)

    assert out == ""
    assert "100%" in err
    assert "API keys" not in err
    assert "Traceback" not in err


def test_a_server_that_is_ready_spares_the_collector_what_it_loaded(tmp_path: Path) -> None:
    with serve_process(tmp_path) as process:
        assert process.stdout
        process.stdout.readline()
        process.send_signal(signal.SIGUSR1)
        assert process.stderr
        line = next(line for line in process.stderr if line.startswith("spared"))

    num_spared, num_collected = (int(word) for word in line.split()[1::2])
    assert num_spared > max(50_000, 10 * num_collected)


def stream_of(process: "subprocess.Popen[str]") -> tuple[str, requests.Response]:
    """The server's URL, and a stream that has begun."""
    assert process.stdout
    url = next(word for word in process.stdout.readline().split() if word.startswith("http"))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    response = requests.post(f"{url}/v1/chat/completions", json=body, stream=True, timeout=20)
    return url, response


@pytest.mark.parametrize("word", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_finish_and_takes_no_new_ones(tmp_path: Path, word: signal.Signals) -> None:
    with serve_process(tmp_path, "--server-name", "127.0.0.1", "--model-name", "tiny", WAITS="1") as process:
        assert process.stdin
        assert process.stderr
        url, response = stream_of(process)
        lines = response.iter_lines()
        first = next(lines)

        process.send_signal(word)
        while "Stopping" not in process.stderr.readline():
            pass
        until_refused(url)
        process.stdin.write("go on\n")
        process.stdin.flush()
        rest = [line for line in lines if line]
        process.wait(timeout=20)

    assert first.startswith(b"data: {")
    assert rest[-1] == b"data: [DONE]"
    assert process.returncode == 0


async def test_a_server_that_was_told_to_stop_is_not_ready_from_that_moment_on() -> None:
    fakes = FakeBackend()
    async with open_store(MEMORY) as store:
        server = _Server(fake_config(), Backend(fakes.engine, fakes.pipeline, fakes.grammars), store, "ready")
        readiness: Readiness = server.config.app.state.readiness  # type: ignore[union-attr]
        async with readiness.watching(fakes.engine, None):
            before = readiness.standing()

            server.handle_exit(signal.SIGTERM, None)

            assert before.is_ready
            assert readiness.standing().stage == DRAINING


def until_refused(url: str) -> None:
    for _ in range(1000):
        try:
            requests.get(f"{url}/health", timeout=20)
        except requests.ConnectionError:
            return
    raise AssertionError("the server still takes requests")


def request_bytes() -> bytes:
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


def answer_on(connection: socket.socket) -> bytes:
    """All until the server closes."""
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_requests_that_were_on_their_way_when_the_signal_came_are_answered(tmp_path: Path) -> None:
    """Those in the kernel's queue, on fresh connections and on one that was used before: the server sees them after the signal."""
    with serve_process(tmp_path, "--server-name", "127.0.0.1", "--model-name", "tiny") as process, contextlib.ExitStack() as stack:
        assert process.stdout
        url = urlsplit(next(word for word in process.stdout.readline().split() if word.startswith("http")))
        used = stack.enter_context(socket.create_connection((url.hostname, url.port), timeout=20))
        used.sendall(request_bytes())
        first = http.client.HTTPResponse(used)
        first.begin()
        assert first.status == 200
        assert first.read()
        os.kill(process.pid, signal.SIGSTOP)
        fresh = [stack.enter_context(socket.create_connection((url.hostname, url.port), timeout=20)) for _ in range(30)]

        for connection in (used, *fresh):
            connection.sendall(request_bytes())
        process.send_signal(signal.SIGTERM)
        os.kill(process.pid, signal.SIGCONT)
        answers = [answer_on(connection) for connection in (used, *fresh)]
        process.wait(timeout=20)

    wrong = [answer[:500] for answer in answers if not (answer.startswith(b"HTTP/1.1 200") and b"chat.completion" in answer)]
    assert wrong == []
    assert process.returncode == 0


def test_connections_without_a_request_are_not_waited_for(tmp_path: Path) -> None:
    words = ["--server-name", "127.0.0.1", "--model-name", "tiny", "--drain-timeout-s", "600"]
    with serve_process(tmp_path, *words) as process:
        assert process.stdout
        url = urlsplit(next(word for word in process.stdout.readline().split() if word.startswith("http")))
        with socket.create_connection((url.hostname, url.port), timeout=20) as idle:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=20)

            assert idle.recv(1) == b""
    assert process.returncode == 0


def test_requests_that_do_not_finish_are_ended_after_the_drain_timeout(tmp_path: Path) -> None:
    words = ["--server-name", "127.0.0.1", "--model-name", "tiny", "--drain-timeout-s", "1"]
    with serve_process(tmp_path, *words, HANGS="1") as process:
        _, response = stream_of(process)

        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)

        assert process.returncode == 0
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            list(response.iter_content())


def test_a_second_signal_ends_the_server_at_once(tmp_path: Path) -> None:
    words = ["--server-name", "127.0.0.1", "--model-name", "tiny", "--drain-timeout-s", "600"]
    with serve_process(tmp_path, *words, HANGS="1", LOOKS_UP="1") as process:
        _, response = stream_of(process)  # running for as long as somebody holds it
        assert process.stderr

        process.send_signal(signal.SIGTERM)
        while "Stopping: 1 running requests have 600 s" not in (line := process.stderr.readline()):
            assert line, "the server ended"
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=5)

    assert response.status_code == 200
    assert process.returncode == 0


def test_a_thread_that_does_not_end_holds_up_the_exit_for_a_moment_only(tmp_path: Path) -> None:
    with serve_process(tmp_path, "--server-name", "127.0.0.1", "--model-name", "tiny", LOOKS_UP="1") as process:
        assert process.stdout
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=LEAVING_S + 10)

    assert process.returncode == 0


def test_listening_everywhere_without_keys_is_warned_about(tmp_path: Path) -> None:
    with serve_process(tmp_path) as process:
        assert process.stdout
        assert "http://127.0.0.1:" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)

    assert "WARNING" in err
    assert "--api-keys" in err


def test_a_hangup_while_the_model_is_loaded_ends_no_server_with_a_key_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text('[[keys]]\nname = "alice"\nkey = "first"')
    with serve_process(tmp_path, "--api-keys-file", str(file), HUNG_UP="1") as process:
        assert process.stdout
        url = next(word for word in process.stdout.readline().split() if word.startswith("http"))
        assert status(url, "first") == 200


@pytest.mark.full
def test_a_key_file_is_read_again_at_a_hangup_and_its_openness_is_warned_about(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text('[[keys]]\nname = "alice"\nkey = "old"')
    file.chmod(0o644)
    with serve_process(tmp_path, "--api-keys-file", str(file), VLM_SERVER_API_KEYS="from-environment") as process:
        assert process.stdout
        assert process.stderr
        url = next(word for word in process.stdout.readline().split() if word.startswith("http"))
        assert status(url, "old") == status(url, "from-environment") == 200
        file.write_text('[[keys]]\nname = "alice"\nkey = "new"')
        process.send_signal(signal.SIGHUP)
        lines = list(iter_until(process.stderr, "read the API keys again"))
        assert (status(url, "old"), status(url, "new"), status(url, "from-environment")) == (401, 200, 200)
        file.write_text("oops")
        process.send_signal(signal.SIGHUP)
        lines += iter_until(process.stderr, "the API keys stay as they were")
        assert status(url, "new") == 200

    log = "".join(lines)
    assert f"{file}, the file of the API keys, can be read or changed by every user" in log
    assert "without API keys" not in log


def status(url: str, key: str) -> int:
    return requests.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=5).status_code


def iter_until(stream: IO[str], words: str) -> Iterator[str]:
    """The lines up to the one that has `words`."""
    for line in stream:
        yield line
        if words in line:
            return
    raise AssertionError(f"no line has {words!r}")


@pytest.mark.full
def test_the_ready_line_of_a_server_with_a_certificate_says_https(tmp_path: Path) -> None:
    issued = trustme.CA().issue_cert("127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "both.pem"))
    names = {"SSL_CERTFILE": str(tmp_path / "both.pem"), "SSL_KEYFILE": str(tmp_path / "both.pem")}
    with serve_process(tmp_path, "--server-name", "127.0.0.1", "--ssl", **names) as process:
        assert process.stdout
        line = process.stdout.readline()

        url = next(word for word in line.split() if word.startswith("http"))
        assert url.startswith("https://")
        assert f"(chat at {url}/ui, API at {url}/v1, docs at {url}/)" in line
        with pytest.raises(requests.exceptions.SSLError):
            requests.get(f"{url}/health", timeout=5)


def test_an_engine_that_cannot_start_ends_the_server_with_one_line(tmp_path: Path) -> None:
    with serve_process(tmp_path, "--server-name", "127.0.0.1", FAILS="1") as process:
        _, err = process.communicate(timeout=20)

    assert process.returncode == 1
    assert err.strip().splitlines()[-1] == f"vlm-server: {tmp_path} cannot be served: no weights of lm_head"
    assert "Traceback" not in err


def test_a_session_store_that_cannot_be_opened_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    for where, reason in (("/dev/null/sessions", "cannot be opened"), ("redis://127.0.0.1:1", "failed")):
        with serve_process(tmp_path, "--server-name", "127.0.0.1", "--session-store", where) as process:
            _, err = process.communicate(timeout=60)

        assert process.returncode == 1
        assert err.strip().splitlines()[-1].startswith("vlm-server: --session-store: the session store")
        assert reason in err
        assert "Loading" not in err


def test_a_port_that_is_taken_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with serve_process(tmp_path, "--server-name", "127.0.0.1", "--server-port", port) as process:
            _, err = process.communicate(timeout=20)

    assert process.returncode == 1
    assert f"127.0.0.1:{port}" in err
    assert "Loading" not in err


async def test_a_small_answer_waits_for_no_acknowledgement_in_asyncios_own_loop() -> None:
    with _listener(fake_config(server_name="127.0.0.1", server_port=0)) as listener:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(accept, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            assert await asyncio.wait_for(accepted, 10) == 1
            writer.close()


@pytest.mark.parametrize(("soft", "hard", "expected"), [(256, 512, 512), (256, 100_000, 65_536), (70_000, 100_000, 70_000)])
def test_as_many_files_as_the_system_lets_it_are_open_at_once(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, expected: int) -> None:
    limits = (soft, hard)

    def set_limits(kind: int, values: tuple[int, int]) -> None:
        nonlocal limits
        limits = values

    monkeypatch.setattr("vlm_server.serving.resource.getrlimit", lambda kind: limits)
    monkeypatch.setattr("vlm_server.serving.resource.setrlimit", set_limits)

    _allow_descriptors()

    assert limits == (expected, hard)


def test_progress_is_a_line_per_quarter_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine("Loading x")

    for percent in range(0, 101, 5):
        line.show(percent / 100)
    line.close()

    assert [text.split()[-1] for text in capsys.readouterr().err.splitlines()] == ["0%", "25%", "50%", "75%", "100%"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_is_shown_to_nobody_where_standard_error_is_gone(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    class Gone(io.StringIO):
        def isatty(self) -> bool:
            return is_terminal

        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("sys.stderr", Gone())
    line = ProgressLine("Loading x")

    line.show(0.5)
    line.close()
