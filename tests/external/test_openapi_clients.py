"""openapi-generator's clients in five languages: made without a complaint about the document, with a model for each of its schemas under
the names that clients know. The Python and the TypeScript one are installed and have a chat with a picture.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import openapi_generator_cli
import pytest
import requests

from tests.contract.fake_engine import TOKENS_PER_IMAGE
from tests.contract.running import RunningServer
from vlm_server.examples import RED_CIRCLE

pytestmark = pytest.mark.external

PROGRAMS = Path(__file__).parent / "openapi_clients"
GENERATOR = Path(openapi_generator_cli.__file__).with_name("openapi-generator.jar")
LIMIT_S = 180
MODELS = {
    *("ChatCompletionRequest", "EmbeddingsRequest", "GenerateRequest", "HTTPValidationError", "ValidationError"),  # LMDeploy's
    *("Input", "LocationInner", "Messages", "Prompt"),
    *("ChatCompletionResponse", "CompletionRequest", "CompletionResponse", "ErrorResponse", "ModelList"),
}
ANSWER = ["Hello! ", "length", TOKENS_PER_IMAGE, "model_not_found"]
# What the generator says of itself or of words of the language that it writes, whatever document it reads.
NOT_OF_THE_DOCUMENT = (
    r"OpenAPI 3\.1 support is still in beta",
    r"Failed to get the schema name: null",  # once for any union of OpenAPI 3.1, of two lines even
    r"Ignoring complex example on request body",  # Java's has no place for examples that are objects
    r"(r#)?type cannot be used as a field/variable name",  # a reserved word of Rust's, and OpenAI's name
    r"\w+ cannot be used as a enum variant name",  # Rust's, of values that are no words, as 1h
    r"(?i)expires_?after\[(anchor|seconds)\] cannot be used as a (field/variable|parameter|enum) name",  # OpenAI's names of a form's fields
    r"(ApplicationJson|ApplicationOctetStream|TextEventStream|TextPlain) cannot be used as a model name",  # Rust's names of media types
    r"(vec<.*>|std::collections::hash_map<.*>) cannot be used as a field/variable name",  # Rust's names of a union's members
    r"(string|bool|int32|int64|float32) \(reserved word\) cannot be used as model name",  # Go's
)


@pytest.fixture(scope="module")
def document(shared_server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clients") / "openapi.json"
    path.write_text(requests.get(f"{shared_server.url}/openapi.json", timeout=10).text)
    return path


@functools.cache
def generated(document: Path, language: str) -> Path:
    """The client's folder. Fails where the generator complains."""
    client = document.parent / language
    command = ["java", "-jar", str(GENERATOR), "generate", "-i", str(document), "-g", language, "-o", str(client)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    lines = re.findall(r".*\b(?:WARN|ERROR)\b.*", run.stdout + run.stderr)
    assert [line for line in lines if not any(re.search(pattern, line) for pattern in NOT_OF_THE_DOCUMENT)] == []
    return client


def printed(command: list[str], folder: Path, server: RunningServer, **environment: str) -> Any:
    arguments = [*command, server.url, server.model, RED_CIRCLE]
    run = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def done(*command: str, folder: Path) -> None:
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


@pytest.mark.parametrize("language", ["python", "typescript-axios", "java", "go", "rust"])
def test_a_client_has_a_model_for_each_schema_and_all_operations_in_one_class(document: Path, language: str) -> None:
    schemas = json.loads(document.read_text())["components"]["schemas"]
    described = {name for name, schema in schemas.items() if schema.get("properties") or "type" not in schema}  # not objects of any form

    models = {path.stem.lower() for path in (generated(document, language) / "docs").glob("*.md")}

    assert described >= MODELS
    assert models == {name.lower() for name in (*described, "DefaultApi")}  # and none that the generator made up: Prompt1


def test_the_python_client_chats_about_a_picture(document: Path, scripted: RunningServer, tmp_path: Path) -> None:
    client = generated(document, "python")
    done(sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path), str(client), folder=tmp_path)

    answer = printed([sys.executable, str(PROGRAMS / "chat.py")], tmp_path, scripted, PYTHONPATH=str(tmp_path))

    assert answer == [*ANSWER, [scripted.model]]
    assert len(scripted.backend.engine.requests[0][0].images) == 1


def test_the_typescript_client_compiles_and_chats_about_a_picture(document: Path, scripted: RunningServer, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PROGRAMS, tmp_path / "program"))
    shutil.copytree(generated(document, "typescript-axios"), folder / "client")
    done("npm", "install", "--no-audit", "--no-fund", folder=folder)
    done("npx", "tsc", "--project", ".", folder=folder)

    answer = printed(["node", str(folder / "built" / "chat.js")], folder, scripted, PATH=os.environ["PATH"])

    assert answer == [*ANSWER, [scripted.model]]
    assert len(scripted.backend.engine.requests[0][0].images) == 1
