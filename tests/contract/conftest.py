"""The server of the contract tests: scripted answers, or with VLM_SERVER_URL one that runs already, whatever its model."""

import os
from collections.abc import Iterator

import pytest

from tests.contract.running import RunningServer, running_server
from vlm_server.client import get_model_list


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RunningServer]:
    url = os.environ.get("VLM_SERVER_URL")
    if url:
        models = get_model_list(f"{url}/v1/models")
        assert models
        yield RunningServer(url, models[0], None)
        return
    with running_server() as server:
        yield server


@pytest.fixture
def server(shared_server: RunningServer) -> RunningServer:
    """A running server, its engine scripted anew."""
    if shared_server.is_scripted:
        shared_server.backend.reset()
    return shared_server
