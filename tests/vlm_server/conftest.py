from collections.abc import Iterator

import pytest

from tests.contract.running import RunningServer, running_server


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RunningServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def server(shared_server: RunningServer) -> RunningServer:
    """A running server over a scripted engine, scripted anew."""
    shared_server.backend.reset()
    return shared_server
