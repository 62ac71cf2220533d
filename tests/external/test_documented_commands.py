"""What the users' documents type into a shell, typed here: curl, and jq behind it."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.contract.fake_engine import DEFAULT_REPLY
from tests.contract.running import RunningServer

pytestmark = pytest.mark.external

BODY = '{"model": "MODEL", "messages": [{"role": "user", "content": "你好"}]}'
STREAMED = '{"model": "MODEL", "messages": [{"role": "user", "content": "写一首诗歌"}], "stream": true}'


def shell(command: str, server: RunningServer, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command with the server's URL and model in it, in bash; it may end with an error."""
    script = command.replace("URL", server.url).replace("MODEL", server.model)
    return subprocess.run(["bash", "-o", "pipefail", "-c", script], cwd=folder, capture_output=True, text=True, timeout=60)


def chat(options: str = "", body: str = BODY) -> str:
    return f"curl -s {options} URL/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"


@pytest.mark.parametrize(
    "command",
    [
        "curl -s URL/v1/models",
        """curl -s URL/v1/chat/interactive -H "Content-Type: application/json" \\
        -d '{"prompt": "Hello! How are you?"}'""",
        chat(),
        """curl -s URL/v1/completions -H "Content-Type: application/json" \\
        -d '{"model": "MODEL", "prompt": "two steps to build a house:"}'""",
    ],
    ids=["models", "interactive", "chat", "completion"],
)
def test_curl_prints_json(command: str, scripted: RunningServer, tmp_path: Path) -> None:
    done = shell(command, scripted, tmp_path)

    assert done.returncode == 0
    assert isinstance(json.loads(done.stdout), dict)


def test_curl_v_shows_status_and_content_length(scripted: RunningServer, tmp_path: Path) -> None:
    done = shell(chat("-v"), scripted, tmp_path)

    heads = done.stderr.lower()
    assert "< http/1.1 200 ok" in heads
    assert f"< content-length: {len(done.stdout.encode())}" in heads
    assert "< content-type: application/json" in heads


def test_a_body_from_a_file_and_an_answer_to_a_file(scripted: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text(BODY.replace("MODEL", scripted.model))
    command = "curl -s URL/v1/chat/completions -H 'Content-Type: application/json' -d @request.json -o response.json"

    assert shell(command, scripted, tmp_path).returncode == 0

    assert json.loads((tmp_path / "response.json").read_text())["choices"][0]["message"]["content"] == DEFAULT_REPLY


def test_jq_finds_the_content(scripted: RunningServer, tmp_path: Path) -> None:
    done = shell(chat() + " | jq .choices[0].message.content", scripted, tmp_path)

    assert json.loads(done.stdout) == DEFAULT_REPLY


def test_a_chinese_stream_ends_with_done(scripted: RunningServer, tmp_path: Path) -> None:
    lines = [line for line in shell(chat("-N", STREAMED), scripted, tmp_path).stdout.split("\n") if line]

    assert lines[-1] == "data: [DONE]"
    contents = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") for line in lines[:-1]]
    assert "".join(content or "" for content in contents) == DEFAULT_REPLY


def test_a_client_that_gives_up_after_max_time_is_noticed(scripted: RunningServer, tmp_path: Path) -> None:
    scripted.backend.engine.hangs_after = 1

    done = shell(chat("--max-time 1"), scripted, tmp_path)

    assert done.returncode == 28  # curl's own: operation timed out
    assert scripted.backend.activity.was_left_within(10)


def test_curl_f_fails_where_the_server_refuses(scripted: RunningServer, tmp_path: Path) -> None:
    refused = shell(chat("-f", '{"model": "no-such-model", "messages": []}'), scripted, tmp_path)

    assert refused.returncode == 22  # curl's own: a status of 400 or above


def test_the_page_at_the_root_names_its_description(scripted: RunningServer, tmp_path: Path) -> None:
    page = shell("curl -s URL/", scripted, tmp_path)
    description = shell("curl -s URL/openapi.json | jq '.paths | keys'", scripted, tmp_path)

    assert "swagger-ui" in page.stdout
    assert "/v1/chat/completions" in json.loads(description.stdout)
