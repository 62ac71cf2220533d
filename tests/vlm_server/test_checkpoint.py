"""What MODEL may be, and where it leads."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vlm_server.small_hub import COMMIT, SmallHub, small_hub
from vlm_server.checkpoint import Checkpoint, CheckpointError, find_adapter, find_checkpoint, find_tokenizer

TWIN = "llava-hf/llava-v1.6-vicuna-7b-hf"
FILES = {
    "config.json": b'{"model_type": "llava_next", "text_config": {"max_position_embeddings": 4096}}',
    "model.safetensors": b"weights",
    "modeling_evil.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
}

LORA_FILES = {"adapter_config.json": b"{}", "adapter_model.bin": b"weights", "tokenizer.model": b"pieces", "optimizer.pt": b"pickle"}


@pytest.fixture(scope="module")
def hub() -> Iterator[SmallHub]:
    with small_hub({TWIN: FILES, "org/plain": FILES, "org/lora": LORA_FILES}, token="the-token") as hub:
        yield hub


def download(hub: SmallHub, home: Path, call: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Prints the checkpoint that `call` finds, in a process of its own: huggingface_hub reads its settings once."""
    code = f"import logging; logging.basicConfig(level='INFO'); from vlm_server.checkpoint import *; print(json.dumps(asdict({call})))"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return subprocess.run(
        [sys.executable, "-c", "import json; from dataclasses import asdict; " + code],
        env={**inherited, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_a_hub_id_is_downloaded_with_the_token_and_without_code_or_pickles(hub: SmallHub, tmp_path: Path, variable: str) -> None:
    done = download(hub, tmp_path, "find_checkpoint('org/plain')", **{variable: "the-token"})

    found = json.loads(done.stdout)
    assert (found["root"], found["name"]) == ("org/plain", "org/plain")
    assert sorted(file.name for file in Path(found["path"]).iterdir()) == ["config.json", "model.safetensors"]
    assert "the-token" not in done.stderr


def test_an_adapter_is_downloaded_without_what_it_was_trained_with(hub: SmallHub, tmp_path: Path) -> None:
    code = "Checkpoint(find_adapter('org/lora'), '', '')"

    done = download(hub, tmp_path, code, HF_TOKEN="the-token")

    folder = Path(json.loads(done.stdout)["path"])
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.bin", "tokenizer.model"]


def test_an_adapter_is_a_folder_that_holds_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        find_adapter(str(tmp_path))
    with pytest.raises(CheckpointError, match="no such folder"):
        find_adapter("./nowhere")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert find_adapter(str(tmp_path)) == str(tmp_path)


def test_the_tokenizer_is_the_given_one_else_the_adapters_else_the_checkpoints(tmp_path: Path) -> None:
    adapter, other = tmp_path / "adapter", tmp_path / "other"
    for folder in (adapter, other):
        folder.mkdir()

    assert find_tokenizer(None, adapter=None) is None
    assert find_tokenizer(None, adapter=str(adapter)) is None
    (adapter / "tokenizer.model").touch()
    assert find_tokenizer(None, adapter=str(adapter)) == str(adapter)
    assert find_tokenizer(str(other), adapter=str(adapter)) == str(other)
    with pytest.raises(CheckpointError, match="--tokenizer-path"):
        find_tokenizer(str(tmp_path / "nowhere"), adapter=None)


def test_llavas_original_layout_is_served_from_its_twin_with_a_log_line(hub: SmallHub, tmp_path: Path) -> None:
    call = f"find_checkpoint('liuhaotian/llava-v1.6-vicuna-7b', revision='v2', download_dir={str(tmp_path / 'here')!r})"

    done = download(hub, tmp_path / "home", call, HF_TOKEN="the-token")

    found = json.loads(done.stdout)
    assert (found["root"], found["name"]) == (TWIN, "liuhaotian/llava-v1.6-vicuna-7b")
    assert found["path"].startswith(str(tmp_path / "here"))
    assert found["path"].endswith(COMMIT)
    assert f"its twin {TWIN} is served" in done.stderr
    assert f"/api/models/{TWIN}/revision/v2" in hub.paths


def test_a_missing_token_is_named(hub: SmallHub, tmp_path: Path) -> None:
    done = download(hub, tmp_path, "find_checkpoint('org/plain')")

    assert done.returncode != 0
    assert "CheckpointError: org/plain: there is no such folder, and the hub has no org/plain, or needs a token (HF_TOKEN)" in done.stderr


def test_an_unknown_revision_is_named(hub: SmallHub, tmp_path: Path) -> None:
    done = download(hub, tmp_path, "find_checkpoint('org/plain', revision='v9')", HF_TOKEN="the-token")

    assert "CheckpointError: org/plain has no revision v9" in done.stderr


def test_a_folder_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 77}')

    found = find_checkpoint(str(tmp_path))

    assert found == Checkpoint(str(tmp_path), str(tmp_path), str(tmp_path))
    assert found.text_config()["max_position_embeddings"] == 77


def test_a_gguf_file_is_itself(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")

    assert find_checkpoint(str(file)).path == str(file)


def test_a_workspace_of_turbomind_is_refused_naming_the_original(tmp_path: Path) -> None:
    weights = tmp_path / "triton_models" / "weights"
    weights.mkdir(parents=True)
    (weights / "config.yaml").write_text("model_config:\n  model_name: internlm2-chat-7b\n")

    with pytest.raises(CheckpointError, match=r"TurboMind workspace.*pass the original checkpoint.*internlm2-chat-7b"):
        find_checkpoint(str(tmp_path))


def test_a_workspace_with_a_model_repository_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "model_repository").mkdir()

    with pytest.raises(CheckpointError, match="TurboMind workspace"):
        find_checkpoint(str(tmp_path))


def test_a_folder_in_llavas_original_layout_is_refused_naming_its_twin(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"mm_vision_tower": "openai/clip", "_name_or_path": "./checkpoints/llava-v1.5-7b"}')

    with pytest.raises(CheckpointError, match=r"llava-hf/llava-1\.5-7b-hf"):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize("model", ["/no/such/folder", "./nothing", "~/nothing-here", "a/b/c", "with space"])
def test_what_is_neither_folder_nor_hub_id_is_refused_without_a_network(model: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder or GGUF file"):
        find_checkpoint(model)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        find_checkpoint(str(tmp_path))


def test_no_model_means_the_embedded_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("vlm_server.embedded.embedded_model_folder", lambda: tmp_path)

    assert find_checkpoint(None) == Checkpoint(str(tmp_path), str(tmp_path), "vlm-demo")
