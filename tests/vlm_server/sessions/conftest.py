from collections.abc import AsyncIterator, Iterator

import pytest

from tests.redis_server import redis_server
from vlm_server.sessions.opening import open_store
from vlm_server.sessions.store import RecordStore


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with redis_server() as url:
        yield url


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def store(request: pytest.FixtureRequest, tmp_path) -> AsyncIterator[RecordStore]:
    """Each kind of store, empty or full of other tests' tenants."""
    where = {"memory": "memory", "sqlite": str(tmp_path / "sessions.sqlite3"), "redis": request.getfixturevalue("redis_url")}[request.param]
    async with open_store(where) as store:
        yield store
