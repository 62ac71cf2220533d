"""`--alpha` on the command line: its bounds, and the window that it lets grow."""

import logging
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--alpha", "0.5"], "alpha: 0.5 is not allowed, only 1 to 1000, or auto"),
        (["--alpha", "nan"], "alpha: nan is not allowed, only 1 to 1000, or auto"),
    ],
)
def test_an_alpha_out_of_bounds_ends_with_one_line(folder: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", folder, *words]) == 1
    assert capsys.readouterr().err == f"vlm-server: {message}\n"


def test_an_alpha_that_is_no_number_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["serve", "x", "--alpha", "much"])

    assert "--alpha: 'much' is neither a number nor auto" in capsys.readouterr().err


def test_alpha_lets_the_window_grow(folder: str) -> None:
    assert config(folder, "--session-len", "4096").engine.session_len == 2048
    assert config(folder, "--session-len", "4096", "--alpha", "2").engine.session_len == 4096
    assert config(folder, "--session-len", "4096", "--alpha", "auto").engine.alpha == pytest.approx(3.3)


def test_an_automatic_alpha_without_a_longer_window_is_said_to_change_nothing(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert config(folder, "--alpha", "auto").engine.alpha == 1

    assert "--alpha auto changes nothing" in caplog.text
