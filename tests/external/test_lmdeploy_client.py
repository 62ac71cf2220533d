"""LMDeploy's own client, from its published wheel, against this server."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.contract.running import RunningServer
from vlm_server.client import APIClient
from vlm_server.examples import RED_CIRCLE

pytestmark = pytest.mark.external

WHEEL = "lmdeploy==0.9.2.post1"  # the last one with all of the client's methods
SCRIPT = Path(__file__).with_name("lmdeploy_client.py")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(Python of an environment with `requests` alone, LMDeploy's wheel)."""
    folder = tmp_path_factory.mktemp("lmdeploy")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=120)
    python = folder / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "requests"], check=True, timeout=300)
    wheel_of = ["--no-deps", "--only-binary", ":all:", "--python-version", "3.11", "--platform", "manylinux2014_x86_64"]
    subprocess.run([*pip, "download", *wheel_of, "--dest", folder, WHEEL], check=True, timeout=300)
    [wheel] = folder.glob("lmdeploy-*.whl")
    return python, wheel


@pytest.fixture(scope="module")
def found(environment: tuple[Path, Path], shared_server: RunningServer) -> dict[str, Any]:
    """What every call gave."""
    python, wheel = environment
    run = subprocess.run([python, "-I", SCRIPT, wheel, shared_server.url, RED_CIRCLE], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    answers: dict[str, Any] = json.loads(run.stdout)
    return answers


def test_it_finds_the_model(found: dict[str, Any], shared_server: RunningServer) -> None:
    assert found["models"] == [shared_server.model]


def test_a_chat_is_the_same_whole_and_streamed(found: dict[str, Any]) -> None:
    [whole] = found["chat"]

    assert whole["choices"][0]["message"]["content"]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in found["chat stream"]) == whole["choices"][0]["message"]["content"]
    assert found["chat stream"][-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "stop"


def test_a_picture_is_seen(found: dict[str, Any]) -> None:
    assert found["chat picture"][0]["usage"]["prompt_tokens_details"]["image_tokens"] > 0
    assert found["interactive picture"][0]["input_tokens"] > found["interactive"][0]["input_tokens"]


def test_a_completion_is_the_same_whole_and_streamed(found: dict[str, Any]) -> None:
    [whole] = found["completion"]

    assert "".join(chunk["choices"][0]["text"] for chunk in found["completion stream"]) == whole["choices"][0]["text"] != ""


def test_an_interactive_answer_is_the_same_whole_and_streamed(found: dict[str, Any]) -> None:
    [whole] = found["interactive"]

    assert "".join(piece["text"] for piece in found["interactive stream"]) == whole["text"] != ""
    assert found["interactive stream"][-1]["tokens"] == whole["tokens"]


def test_a_session_is_kept_from_turn_to_turn_and_ended(found: dict[str, Any]) -> None:
    [[text, tokens, reason]] = found["turn 1"]

    assert (bool(text), tokens > 0, reason) == (True, True, "stop")
    assert found["turn 2 stream"][-1][2] == "stop"
    assert found["turn 3"][0]["history_tokens"] > found["turn 3"][0]["input_tokens"]
    assert found["after the end"][0]["history_tokens"] == 0


def test_encode_gives_what_our_client_gives(found: dict[str, Any], shared_server: RunningServer) -> None:
    ours = APIClient(shared_server.url)

    assert found["encode"] == list(ours.encode("hi there"))
    assert found["encode several"] == list(ours.encode(["hi", "there"], add_bos=False))


def test_an_error_is_read_as_its_users_read_it(found: dict[str, Any]) -> None:
    [error] = found["unknown model"]

    assert (error["object"], error["code"], "no-such-model" in error["message"]) == ("error", 404, True)
