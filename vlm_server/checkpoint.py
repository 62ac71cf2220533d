"""From what the user calls the model to a local folder (or GGUF file): folders, hub ids, and what other tools left behind.

Downloads through huggingface_hub, which honours HF_ENDPOINT, HF_HOME and HF_TOKEN. Knows nothing of weights or of HTTP routes.
"""

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

EMBEDDED_NAME = "vlm-demo"  # the model name of a server without MODEL

# Original LLaVA layouts → the same weights as transformers reads them.
_HF_TWINS = {
    "liuhaotian/llava-v1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "liuhaotian/llava-v1.5-13b": "llava-hf/llava-1.5-13b-hf",
    "liuhaotian/llava-v1.6-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "liuhaotian/llava-v1.6-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    "liuhaotian/llava-v1.6-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
    "liuhaotian/llava-v1.6-34b": "llava-hf/llava-v1.6-34b-hf",
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_TURBOMIND_MARKS = ("triton_models", "model_repository")


class CheckpointError(Exception):
    """There is no such checkpoint, or none that we can read; the message says what to pass instead."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: str  # a folder, or a GGUF file
    root: str  # what /v1/models shows: the folder or the hub id
    name: str  # the model's name where --model-name gives none

    def text_config(self, *, trust_remote_code: bool = False) -> dict[str, Any]:
        """The decoder's part of the config, which states the window. Reads the JSON; what that leaves to defaults, transformers knows."""
        file = Path(self.path) / "config.json"
        config: dict[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {}
        text_config = config.get("text_config", config)
        if isinstance(text_config, dict) and "max_position_embeddings" in text_config:
            return text_config
        return self._full_text_config(trust_remote_code)

    def _full_text_config(self, trust_remote_code: bool) -> dict[str, Any]:
        import vision  # noqa: F401  first: it makes torchvision, and so transformers, importable

        # isort: split
        from transformers import AutoConfig

        path = Path(self.path)
        source = {"pretrained_model_name_or_path": str(path)}
        if path.is_file():
            source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        config = AutoConfig.from_pretrained(**source, trust_remote_code=trust_remote_code)
        return dict(config.get_text_config().to_dict())


def find_checkpoint(
    model: str | None, *, revision: str | None = None, download_dir: str | None = None, trust_remote_code: bool = False
) -> Checkpoint:
    """The checkpoint that `model` means; None is the embedded one. Blocks while it is downloaded or assembled. Raises CheckpointError."""
    if model is None:
        return _embedded()
    path = Path(model).expanduser()
    if path.is_dir():
        _check_folder(path)
        return Checkpoint(str(path), str(path), model)
    if path.suffix == ".gguf" and path.is_file():
        return Checkpoint(str(path), str(path), model)
    if path.is_absolute() or model.startswith((".", "~")) or not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model}: there is no such folder or GGUF file, and it is no hub id such as org/name")
    return _download(model, revision, download_dir, trust_remote_code)


def find_adapter(name: str, *, download_dir: str | None = None) -> str:
    """The folder of a LoRA: a folder, or a hub id that is downloaded. Raises CheckpointError."""
    path = Path(name).expanduser()
    if path.is_dir():
        folder = str(path)
    elif path.is_absolute() or name.startswith((".", "~")) or not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: there is no such folder, and it is no hub id such as org/name")
    else:
        folder = _snapshot(name, name, None, download_dir, [*_WANTED, "adapter_model.bin"])
    if not (Path(folder) / "adapter_config.json").is_file():
        raise CheckpointError(f"{name} has no adapter_config.json: it is no LoRA in PEFT's layout")
    return folder


def find_tokenizer(path: str | None, *, adapter: str | None) -> str | None:
    """The folder whose tokenizer is used in place of the checkpoint's: the given one, else the adapter's where it brings one."""
    if path is not None:
        if not Path(path).expanduser().is_dir():
            raise CheckpointError(f"--tokenizer-path: there is no folder {path}")
        return str(Path(path).expanduser())
    files = ("tokenizer.json", "tokenizer.model")
    return adapter if adapter and any((Path(adapter) / file).is_file() for file in files) else None


def _embedded() -> Checkpoint:
    from vlm_server.embedded import EmbeddedModelUnavailable, embedded_model_folder

    try:
        folder = str(embedded_model_folder())
    except EmbeddedModelUnavailable as error:
        raise CheckpointError(str(error)) from error
    return Checkpoint(folder, folder, EMBEDDED_NAME)


def _check_folder(folder: Path) -> None:
    """Raises CheckpointError for folders of other tools."""
    if any((folder / mark).exists() for mark in _TURBOMIND_MARKS):
        named = _turbomind_name(folder)
        origin = f" ({named}, its config says)" if named else ""
        raise CheckpointError(
            f"{folder} is a TurboMind workspace, made by lmdeploy convert; pass the original checkpoint that it was converted from{origin}"
        )
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{folder} has no config.json; pass a checkpoint folder in the Hugging Face layout, a GGUF file or a hub id")
    config = json.loads(config_file.read_bytes())
    if "mm_vision_tower" in config and "vision_config" not in config:
        raise CheckpointError(f"{folder} is a LLaVA checkpoint in its original layout; pass its -hf twin, e.g. {_twin_of(config)}")


def _twin_of(config: dict[str, object]) -> str:
    name = str(config.get("_name_or_path", "")).removeprefix("./checkpoints/").rpartition("/")[2]
    return _HF_TWINS.get(f"liuhaotian/{name}", "llava-hf/llava-v1.6-vicuna-7b-hf")


def _turbomind_name(folder: Path) -> str | None:
    """The model's name in a workspace's own config."""
    for file in (*folder.glob("triton_models/weights/config.*"), *folder.glob("model_repository/**/config.*")):
        found = re.search(r"^\s*model_name\s*[:=]\s*['\"]?([^'\"\n]+)", file.read_text("utf-8", "replace"), re.MULTILINE)
        if found:
            return found[1].strip()
    return None


def _download(model: str, revision: str | None, download_dir: str | None, trust_remote_code: bool) -> Checkpoint:
    repository = _HF_TWINS.get(model, model)
    if repository != model:
        logger.info("%s is in LLaVA's original layout; its twin %s is served", model, repository)
    folder = _snapshot(repository, model, revision, download_dir, [*_WANTED, *(["*.py"] if trust_remote_code else [])])
    _check_folder(Path(folder))
    return Checkpoint(folder, repository, model)


def _snapshot(repository: str, asked: str, revision: str | None, download_dir: str | None, wanted: list[str]) -> str:
    """The folder of a repository's files. Raises CheckpointError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or None
    try:
        return snapshot_download(repository, revision=revision, cache_dir=download_dir, token=token, allow_patterns=wanted)
    except RevisionNotFoundError:
        raise CheckpointError(f"{repository} has no revision {revision}") from None
    except GatedRepoError:
        raise CheckpointError(f"{repository} is gated: accept its terms on the hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        hint = "or the token may not see it" if token else "or needs a token (HF_TOKEN)"
        raise CheckpointError(f"{asked}: there is no such folder, and the hub has no {repository}, {hint}") from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{repository} could not be downloaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
