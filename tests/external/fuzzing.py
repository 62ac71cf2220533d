"""schemathesis over every operation of `openapi.json`: no 5xx, and every answer true to its schema.

`make test-api-long [EXAMPLES=1000] [ARGS="--seed 7"]` is the long run, before a scripted engine or, with `--url`, any server;
`test_schemathesis.py` has a short one.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

from tests.contract.running import fake_config, running_server

# Not negative_data_rejection: "5" is read as 5 and 0 as false, as LMDeploy's users have it. Nor positive_data_acceptance: what fields ask
# for together, and what a grammar can say, no schema of one field tells.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
    "missing_required_header",
    "ignored_auth",
)
KEY = "a-key"
ENDS_THE_SERVER = "/terminate"
REQUEST_LIMIT_S = 60  # a model that really answers needs some on a busy machine


def fuzz(
    url: str, *, key: str, max_examples: int, seed: int, limit_s: float, folder: Path, output: int | None = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """schemathesis's exit status, 0 where it found nothing, and its report where `output` is a pipe. Raises TimeoutExpired."""
    document, header = folder / "openapi.json", f"Authorization: Bearer {key}"
    document.write_text(json.dumps(_for_schemathesis(url, {"Authorization": f"Bearer {key}"})))
    options = [f"--url={url}", f"--checks={','.join(CHECKS)}", f"--exclude-path={ENDS_THE_SERVER}", f"--header={header}"]
    options += [f"--max-examples={max_examples}", f"--seed={seed}", "--continue-on-failure", f"--request-timeout={REQUEST_LIMIT_S}"]
    options += ["--phases=examples,coverage,fuzzing", "--generation-database=none", "--no-color"]
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(document), *options]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1"}
    return subprocess.run(command, cwd=folder, env=environment, timeout=limit_s, text=True, stdout=output, stderr=output, check=False)


@contextlib.contextmanager
def scripted_url() -> Iterator[str]:
    """A server that wants `KEY`."""
    with running_server(fake_config(api_keys=(KEY,), enable_abort_handling=True)) as server:
        yield server.url


def _for_schemathesis(url: str, headers: dict[str, str]) -> dict[str, Any]:
    """The document, with the model that is served as the only one, so that requests come further than that; and the schemas of events
    where OpenAPI 3.2 has them, which schemathesis reads and generators of clients do not yet.
    """
    [card] = requests.get(f"{url}/v1/models", headers=headers, timeout=REQUEST_LIMIT_S).json()["data"]
    document: dict[str, Any] = requests.get(f"{url}/openapi.json", timeout=REQUEST_LIMIT_S).json()
    for name, schema in document["components"]["schemas"].items():
        if name.endswith("Request") and "model" in schema["properties"]:
            schema["properties"]["model"] = {"type": "string", "enum": [card["id"]]}
    for operations in document["paths"].values():
        for operation in operations.values():
            for response in operation["responses"].values():
                if stream := response.get("content", {}).get("text/event-stream"):
                    _describe_events(stream)
    return document


def _describe_events(stream: dict[str, Any]) -> None:
    del stream["schema"]  # of the text; before 3.2 schemathesis takes it for an event's
    if "x-event-schema" in stream:
        event = {"anyOf": [stream["x-event-schema"], {"$ref": "#/components/schemas/ErrorResponse"}]}
        data = {"anyOf": [{"enum": ["[DONE]"]}, {"type": "string", "contentMediaType": "application/json", "contentSchema": event}]}
        stream["itemSchema"] = {"type": "object", "required": ["data"], "properties": {"data": data}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-examples", type=int, default=1000, help="of each operation")
    parser.add_argument("--url", help="of a server that runs; default: one with a scripted engine")
    parser.add_argument("--key", default=KEY, help="what that server takes for its API key")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=6 * 3600)
    arguments = parser.parse_args()
    limits = {"max_examples": arguments.max_examples, "seed": arguments.seed, "limit_s": arguments.limit_s}
    running = contextlib.nullcontext(arguments.url) if arguments.url else scripted_url()
    with tempfile.TemporaryDirectory() as folder, running as url:
        return fuzz(url, key=arguments.key, folder=Path(folder), output=None, **limits).returncode


if __name__ == "__main__":
    sys.exit(main())
