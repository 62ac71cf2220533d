"""Command lines as LMDeploy's users type them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlm_server import __version__
from vlm_server.cli import main, parse, server_config
from vlm_server.config import ServerConfig
from vlm_server.flags import FLAGS


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 4096}')
    return str(tmp_path)


def config(*words: str) -> ServerConfig:
    return server_config(parse(words))


def test_both_orders_of_words_mean_the_same(folder: str) -> None:
    flags = ["--server-name", "127.0.0.1", "--server-port", "8000", "--tp", "1", "--session-len", "2048"]

    assert config("serve", folder, *flags) == config("serve", "api_server", folder, *flags)


def test_the_documented_flags_are_read(folder: str) -> None:
    words = [
        "--cache-max-entry-count",
        "0.5",
        "--model-name",
        "NAME",
        "--tp",
        "2",
        "--max-batch-size",
        "8",
        "--dtype",
        "float32",
        "--log-level",
        "WARNING",
    ]

    found = config("serve", "api_server", folder, "--meta-instruction", "Be kind.", "--api-keys", "a", "b", *words)

    assert found.engine.cache_max_entry_count == 0.5
    assert (found.engine.tp, found.engine.max_batch_size, found.engine.dtype) == (2, 8, "float32")
    assert (found.model_name, found.model_root, found.meta_instruction) == ("NAME", folder, "Be kind.")
    assert (found.api_keys, found.log_level) == (("a", "b"), "WARNING")


def test_the_chat_template_and_its_words_are_read(folder: str) -> None:
    found = config("serve", folder, "--chat-template", "qwen", "--chat_template_args", '{"stop_words": ["a_b"]}')

    assert (found.chat_template, found.chat_template_args) == ("qwen", '{"stop_words": ["a_b"]}')


@pytest.mark.parametrize("word", ["--session-len", "--session_len"])
@pytest.mark.parametrize("joined", [True, False])
def test_underscores_and_hyphens_are_alike(folder: str, word: str, joined: bool) -> None:
    words = [f"{word}=123"] if joined else [word, "123"]

    assert config("serve", folder, *words).engine.session_len == 123


def test_underscores_in_values_stay(folder: str) -> None:
    assert config("serve", folder, "--model_name=my_model_x").model_name == "my_model_x"
    assert config("serve", folder, "--model-name", "my_model_x").model_name == "my_model_x"


def test_the_model_is_named_as_it_was_given(folder: str) -> None:
    assert config("serve", folder).model_name == folder


def test_the_defaults_are_the_documented_ones(folder: str) -> None:
    found = config("serve", folder)

    assert (found.server_name, found.server_port, found.log_level) == ("0.0.0.0", 23333, "INFO")
    assert (found.engine.session_len, found.allow_origins, found.api_keys) == (4096, ("*",), ())


def test_parsers_are_named_as_peers_name_them(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = server_config(parse(["serve", folder, "--tool-call-parser", "llama3_json", "--reasoning-parser", "deepseek-r1"]))
    unset = server_config(parse(["serve", folder]))

    assert (config.tool_call_parser, config.reasoning_parser) == ("llama3", "think")
    assert (unset.tool_call_parser, unset.reasoning_parser) == ("auto", "auto")
    with pytest.raises(SystemExit):
        parse(["serve", folder, "--tool-call-parser", "gpt"])
    assert "--tool-call-parser: 'gpt' is no parser; there are auto, none, hermes" in capsys.readouterr().err


def test_vision_flags_are_read(folder: str) -> None:
    found = config("serve", folder, "--allow-private-media", "10.0.0.0/8", "::1", "--allowed-local-media-path", folder)

    assert found.vision.allow_private_media == ("10.0.0.0/8", "::1")
    assert found.vision.allowed_local_media_path == folder


def test_switches_that_say_no_work_as_lmdeploys_users_type_them(folder: str) -> None:
    found = config("serve", folder, "--disable-metrics", "--disable_fastapi_docs", "--disable_ui")

    assert (found.enable_metrics, found.enable_docs, found.enable_ui) == (False, False, False)


@pytest.mark.parametrize(
    "words",
    [
        ["--chat-template", "nope"],
        ["--chat-template", "deepseek-v4"],
        ["--chat-template-args", "{}"],
        ["--chat-template", "/proc/self/mem"],
    ],
)
def test_a_wrong_chat_template_ends_with_one_line_before_anything_is_loaded(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "/no/such/folder", *words]) == 1

    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"vlm-server: {words[0].removeprefix('--').replace('-', '_')}: ")


def test_keys_come_from_flag_file_and_environment(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.toml"
    file.write_text('[[keys]]\nname = "alice"\nkey = "c"')
    monkeypatch.setenv("VLM_SERVER_API_KEYS", "b")

    for words in (["--api-keys", "a", f"@{file}"], ["--api-keys", "a", "--api-keys-file", str(file)]):
        found = config("serve", folder, *words)
        assert (found.api_keys, found.api_key_files) == (("a", "b"), (str(file),))
        assert found.needs_key


def test_processes_that_the_server_starts_do_not_inherit_its_secrets(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[ServerConfig, set[str]]] = []
    monkeypatch.setattr("vlm_server.serving.serve", lambda config: seen.append((config, set(os.environ))))
    monkeypatch.setenv("VLM_SERVER_API_KEYS", "hush")
    monkeypatch.setenv("SSL_KEYFILE_PASSWORD", "hush")

    assert main(["serve", folder]) == 0

    [(found, names)] = seen
    assert found.api_keys == ("hush",)
    assert not names & {"VLM_SERVER_API_KEYS", "SSL_KEYFILE_PASSWORD"}


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["--api-keys"], "--api-keys: at least one is needed"),
        (["--api-keys-file"], "--api-keys-file: at least one is needed"),
        (["--api-keys", "@/no/such.toml"], "/no/such.toml: there is no such file"),
        (["--api-keys-file", "/no/such.toml"], "/no/such.toml: there is no such file"),
        (["--api-keys", "a b"], "--api-keys: key 1: only visible ASCII"),
        (["--allow-credentials"], "allow_credentials: True is not allowed"),
    ],
)
def test_a_server_that_was_to_have_keys_never_starts_without(
    folder: str, words: list[str], start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", folder, *words]) == 1

    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"vlm-server: {start}")


@pytest.mark.parametrize("words", [["--tp", "0"], ["--allow-private-media", "x"], ["--server-port", "70000"], ["--root-path", "x/"]])
def test_a_value_out_of_bounds_ends_with_one_line_that_names_the_flag(
    folder: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", folder, *words]) == 1

    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("vlm-server: ")
    assert words[0].removeprefix("--").replace("-", "_") in line


def test_a_checkpoint_that_does_not_exist_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "/no/such/folder"]) == 1

    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("words", [["serve", "x", "--nope"], ["serve", "x", "--session", "1"], ["nope"], []])
def test_what_is_not_known_is_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(words)

    assert caught.value.code == 2


@pytest.mark.parametrize("words", [["serve", "-h"], ["serve", "api_server", "-h"]])
def test_the_help_has_every_flag(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(words)

    text = capsys.readouterr().out
    for flag in (flag for group in FLAGS.values() for flag in group):
        assert f"--{flag.name}" in text
        assert flag.help.split()[0] in text


@pytest.mark.parametrize("word", ["-v", "--version"])
def test_the_version_is_printed(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([word])

    assert capsys.readouterr().out.strip() == f"vlm-server {__version__}"


def test_the_version_is_the_projects() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"

    assert re.search(r'^version = "(.+)"', project.read_text(), re.MULTILINE)[1] == __version__  # type: ignore[index]


def test_help_needs_no_heavy_import() -> None:
    heavy = "{'torch', 'transformers', 'fastapi', 'vision.service'}"
    code = f"import sys; from vlm_server.cli import parse; parse(['serve', 'x']); print(sorted({heavy} & set(sys.modules)))"

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True, cwd=Path(__file__).parents[2]
    )

    assert done.stdout.strip() == "[]"


def test_check_env_prints_and_dumps_the_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check_env", "--dump-file", str(tmp_path / "env.json")]) == 0

    printed = capsys.readouterr().out
    dumped: dict[str, Any] = json.loads((tmp_path / "env.json").read_text())
    assert dumped["vlm-server"] == __version__
    assert f"torch: {dumped['torch']}" in printed


def test_the_model_may_be_left_out() -> None:
    assert parse(["serve"]).model is None
    assert parse(["serve", "api_server", "--tp", "1"]).model is None
