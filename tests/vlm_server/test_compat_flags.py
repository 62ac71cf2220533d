"""The command line of Chinese-LLaMA-Alpaca's server: `--compat alpaca` and what it changes."""

from pathlib import Path

import pytest

from vlm_server.cli import main, parse, server_config
from vlm_server.config import ServerConfig


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 2048}')
    return str(tmp_path)


def config(*words: str) -> ServerConfig:
    return server_config(parse(["serve", *words]))


def test_the_profile_has_its_own_port_name_and_template(folder: str) -> None:
    found = config(folder, "--compat", "alpaca")

    assert (found.compat, found.server_port, found.model_name, found.chat_template) == ("alpaca", 19327, "chinese-llama-alpaca", "alpaca")
    assert (found.model_root, found.engine.device, found.engine.gpus) == (folder, "auto", ())


def test_flags_that_are_given_win_over_the_profiles(folder: str) -> None:
    found = config(folder, "--server-port", "8000", "--compat", "alpaca", "--model-name", "mine", "--chat-template", "qwen")

    assert (found.server_port, found.model_name, found.chat_template) == (8000, "mine", "qwen")


def test_without_the_profile_nothing_changes(folder: str) -> None:
    found = config(folder)

    assert (found.compat, found.server_port, found.model_name, found.chat_template) == ("none", 23333, folder, None)
    assert found == config(folder, "--compat", "none")


def test_the_documented_line_is_read(folder: str) -> None:
    found = config("--compat", "alpaca", "--base_model", folder, "--tokenizer_path", folder, "--gpus", "0,1", "--load_in_8bit")

    assert (found.engine.model_folder, found.tokenizer_folder, found.engine.load_in_8bit) == (folder, folder, True)
    assert (found.engine.gpus, found.engine.tp, found.engine.device) == (("0", "1"), 2, "cuda")


def test_the_model_is_given_once(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", folder, "--base_model", folder]) == 1
    assert capsys.readouterr().err == f"vlm-server: base_model: MODEL is given already: {folder}; only one of the two is allowed\n"
