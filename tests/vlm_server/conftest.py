from collections.abc import Iterator

import pytest

from tests.contract.running import RunningServer, running_server
from tests.vlm_server.files_client import Client


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RunningServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def server(shared_server: RunningServer) -> RunningServer:
    """A running server over a scripted engine, scripted anew."""
    shared_server.backend.reset()
    return shared_server


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    """Of that server's files, which end with the test."""
    client = Client(server)
    yield client
    for file_id in client.ids():
        client.send("DELETE", f"/v1/files/{file_id}")
