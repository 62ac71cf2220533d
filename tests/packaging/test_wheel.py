import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from vlm_server.examples import RED_CIRCLE

CLONE = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(CLONE))
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the clone with the wheel's packages; the libraries that they need are those of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--target", str(folder), str(wheel))
    return folder


@pytest.fixture
def server_url(installed: Path, tmp_path: Path) -> Iterator[str]:
    """The installed server with its embedded model, assembled from the wheel's own assets."""
    command = [sys.executable, "-m", "vlm_server.cli", "serve", "--server-name", "127.0.0.1", "--server-port", "0"]
    environment = environment_for(installed) | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            ready = next((line for line in process.stdout if line.startswith("Ready")), "")
            yield re.search(r"http://[\d.]+:\d+", ready)[0]
        finally:
            process.terminate()


def test_the_wheel_brings_the_assets_and_all_pages_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()

    assert {"vlm_server/_assets/demo_model/weights.safetensors", "vlm_server/_assets/demo_model/assemble.py"} <= set(names)
    assert any(name.startswith("vlm_server/ui/swagger/") and name.endswith(".js") for name in names)
    assert {"vlm_server/ui/chat/index.html", "vlm_server/ui/chat/app.js", "vlm_server/ui/chat/vendor/purify.mjs"} <= set(names)
    assert {"vlm_server/ui/status/index.html", "vlm_server/ui/status/app.js", "vlm_server/ui/chat/base.css"} <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"vlm_server", "vision", "engine"}


def test_a_server_installed_outside_the_clone_answers_about_a_picture(installed: Path, server_url: str) -> None:
    location = subprocess.check_output(
        [sys.executable, "-c", "import vlm_server; print(vlm_server.__file__)"], env=environment_for(installed), cwd=installed, text=True
    )
    (model,) = requests.get(f"{server_url}/v1/models", timeout=10).json()["data"]
    parts = [{"type": "text", "text": "Describe the image please"}, {"type": "image_url", "image_url": {"url": RED_CIRCLE}}]
    body = {"model": model["id"], "messages": [{"role": "user", "content": parts}], "max_tokens": 32}

    response = requests.post(f"{server_url}/v1/chat/completions", json=body, timeout=60)

    assert Path(location.strip()).is_relative_to(installed)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"]
    assert response.json()["usage"]["prompt_tokens_details"]["image_tokens"] > 0


def environment_for(installed: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)
