"""`AsyncAPIClient`: the same calls as `APIClient`'s, on an event loop; and the limits of both."""

import inspect
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import requests

from tests.contract.running import RunningServer, fake_config, running_server
from vlm_server.client import APIClient, AsyncAPIClient

HELLO = [{"role": "user", "content": "Hello! How are you?"}]
GREEDY = {"temperature": 0.0}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("chat_completions_v1", {"messages": HELLO, **GREEDY}),
    "streamed chat": ("chat_completions_v1", {"messages": HELLO, "stream": True, **GREEDY}),
    "completion": ("completions_v1", {"prompt": "hi", **GREEDY}),
    "streamed completion": ("completions_v1", {"prompt": "hi", "stream": True, **GREEDY}),
    "turn": ("chat_interactive_v1", {"prompt": "hi", **GREEDY}),
    "streamed turn": ("chat_interactive_v1", {"prompt": "hi", "stream": True, **GREEDY}),
    "refused": ("chat_interactive_v1", {"prompt": "hi", "temperature": 3.0}),
    "refused stream": ("chat_completions_v1", {"messages": HELLO, "temperature": 3.0, "stream": True}),
}


async def collected(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


def without_ids(items: list[Any]) -> list[Any]:
    return [{name: value for name, value in item.items() if name not in ("id", "created")} for item in items]


@pytest.mark.parametrize("name", CALLS)
async def test_every_call_gives_what_the_blocking_client_gives(server: RunningServer, name: str) -> None:
    method, fields = CALLS[name]
    model = {} if method == "chat_interactive_v1" else {"model": server.model}

    expected = list(getattr(APIClient(server.url), method)(**model, **fields))
    found = await collected(getattr(AsyncAPIClient(server.url), method)(**model, **fields))

    assert without_ids(found) == without_ids(expected)


async def test_models_and_encode_are_awaited(server: RunningServer) -> None:
    client = AsyncAPIClient(server.url)

    assert await client.available_models == [server.model]
    assert await client.encode("hi there") == APIClient(server.url).encode("hi there")


async def test_a_session_is_kept_by_chat_until_it_is_ended(server: RunningServer) -> None:
    client = AsyncAPIClient(server.url)

    [(text, tokens, reason)] = await collected(client.chat("hi", session_id=7))
    [kept] = await collected(client.chat_interactive_v1("and?", session_id=7, interactive_mode=True))
    await client.end_session(7)
    [anew] = await collected(client.chat_interactive_v1("and?", session_id=7))

    assert text
    assert tokens > 0
    assert reason in ("stop", "length")
    assert (kept["history_tokens"] > 0, anew["history_tokens"]) == (True, 0)


def test_both_clients_have_the_same_methods_and_defaults() -> None:
    for name, member in inspect.getmembers(APIClient, inspect.isfunction):
        if not name.startswith("_"):
            assert list(inspect.signature(member).parameters.values()) == list(
                inspect.signature(getattr(AsyncAPIClient, name)).parameters.values()
            )


async def test_the_key_is_sent() -> None:
    with running_server(fake_config(api_keys=("secret",))) as server:
        assert await AsyncAPIClient(server.url).available_models is None
        assert await AsyncAPIClient(server.url, "secret").available_models == [server.model]


async def test_closing_a_stream_closes_its_connection_and_ends_the_answer(server: RunningServer) -> None:
    server.backend.engine.hangs_after = 1
    items = AsyncAPIClient(server.url).chat_completions_v1(server.model, HELLO, stream=True)

    async for _ in items:
        break
    await items.aclose()  # type: ignore[attr-defined]

    assert server.backend.activity.was_left_within(10)


async def test_an_answer_that_never_comes_ends_at_the_timeout(server: RunningServer) -> None:
    server.backend.engine.hangs_after = 0

    with pytest.raises(requests.ReadTimeout):
        list(APIClient(server.url, timeout=(10, 0.1)).chat_completions_v1(server.model, HELLO))
    with pytest.raises(aiohttp.ServerTimeoutError):
        await collected(AsyncAPIClient(server.url, timeout=(10, 0.1)).chat_completions_v1(server.model, HELLO))


def test_a_server_that_is_not_there_is_an_error_of_the_connection() -> None:
    with pytest.raises(requests.ConnectionError):
        list(APIClient("http://127.0.0.1:9", timeout=1).chat_completions_v1("m", HELLO))
