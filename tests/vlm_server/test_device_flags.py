"""`--gpus` and `--only-cpu`: which devices they choose."""

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


def test_gpus_are_chosen_by_number_with_a_process_each(folder: str) -> None:
    found = config(folder, "--gpus", "3, 5").engine

    assert (found.gpus, found.tp, found.device) == (("3", "5"), 2, "cuda")


def test_only_cpu_wins_over_gpus_as_the_reference_has_it(folder: str) -> None:
    found = config(folder, "--only_cpu", "--gpus", "0,1").engine

    assert (found.device, found.gpus, found.tp) == ("cpu", (), 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0,1", "--tp", "4"], "tp: 4 is not allowed with --gpus 0,1, only 2: each process has a device of its own"),
        (["--gpus", "0", "--device", "cpu"], "gpus: not allowed with --device cpu"),
        (["--only-cpu", "--device", "cuda"], "only_cpu: not allowed with --device cuda"),
        (["--gpus", ""], "gpus: ('',) is not allowed, only numbers or UUIDs of CUDA devices, each once"),
        (["--gpus", "1,1"], "gpus: ('1', '1') is not allowed, only numbers or UUIDs of CUDA devices, each once"),
    ],
)
def test_what_contradicts_itself_ends_with_one_line(
    folder: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", folder, *words]) == 1
    assert capsys.readouterr().err == f"vlm-server: {message}\n"
