"""The server process: what it prints, when it is ready, how it ends."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from tests.contract.running import fake_config
from vlm_server.serving import ProgressLine, _listener

SCRIPTED = """
import contextlib, os, sys
import vlm_server.serving as serving
from engine.request import EngineDeadError
from tests.contract.fake_engine import FakeBackend

def open_backend(config, *, on_progress):
    on_progress(0.5)
    on_progress(1.0)
    if os.environ.get("FAILS"):
        raise EngineDeadError("no weights of lm_head", is_final=True)
    return FakeBackend().open(config)

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


def test_listening_everywhere_without_keys_is_warned_about(tmp_path: Path) -> None:
    with serve_process(tmp_path) as process:
        assert process.stdout
        assert "http://127.0.0.1:" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)

    assert "WARNING" in err
    assert "--api-keys" in err


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


def test_progress_is_a_line_per_quarter_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine("Loading x")

    for percent in range(0, 101, 5):
        line.show(percent / 100)
    line.close()

    assert [text.split()[-1] for text in capsys.readouterr().err.splitlines()] == ["0%", "25%", "50%", "75%", "100%"]
