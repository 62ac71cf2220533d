"""The real server of the embedded model, driven by the official SDK: many at once, crashes, clients that leave."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import openai
import pytest

from tests.end_to_end.counted import DETAILS, chat, counted, tokens_before
from tests.end_to_end.pictures import drawn
from tests.server_process import ServerProcess, data_url, server_process

NUM_CLIENTS = 32
GONE_WITHIN_S = 1.0


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with server_process(None, "--allow-private-media", "127.0.0.0/8", "--max-batch-size", "32") as process:
        yield process


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client


def conversation(number: int) -> list[dict[str, Any]]:
    """Every second one with a picture of its own."""
    if number % 2:
        return [{"role": "user", "content": f"Write one sentence about the number {number}."}]
    picture = {"type": "image_url", "image_url": {"url": data_url(drawn(number))}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": "Describe the image please"}]}]


async def streamed(client: openai.AsyncOpenAI, number: int, **fields: Any) -> str:
    stream = await client.chat.completions.create(
        model=await served_name(client), messages=conversation(number), temperature=0, max_tokens=24, stream=True, **fields
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


async def served_name(client: openai.AsyncOpenAI) -> str:
    return (await client.models.list()).data[0].id


@pytest.mark.full
async def test_thirty_two_streams_at_once_each_equal_their_own_answer_alone(server, client):
    together = await asyncio.gather(*(streamed(client, number) for number in range(NUM_CLIENTS)))

    alone = [await streamed(client, number) for number in range(NUM_CLIENTS)]

    assert together == alone
    assert len(set(together)) > NUM_CLIENTS / 4
    assert server.metric("vlm:max_batch_size") > 1
    assert server.metric("vlm:prefix_cache_hit_tokens_total") > 0
    assert server.metric("vlm:embedding_cache_hits_total") > 0


async def test_usage_counts_the_tokens_of_a_picture(client):
    answer = await client.chat.completions.create(model=await served_name(client), messages=conversation(2), max_tokens=1)

    details = answer.usage.prompt_tokens_details.model_dump()
    assert details["image_tokens"] == 64
    assert answer.usage.prompt_tokens > 64


@pytest.mark.parametrize("detail", DETAILS)
async def test_a_pictures_header_tells_what_a_chat_with_it_is_charged(server, detail):
    sizes = ((1, 1), (1, 900), (700, 1300))

    results = [await asyncio.to_thread(counted, server.url, size, detail, is_on_its_side=size == (700, 1300)) for size in sizes]

    assert all(result.before == result.charged > 64 for result in results)


@pytest.mark.parametrize(
    ("fields", "settings", "param"),
    [
        ({}, {"do_pan_and_scan": True}, "mm_processor_kwargs.do_pan_and_scan"),
        ({"min_pixels": 10**9}, {}, "messages[0].content[1].min_pixels"),
        ({"max_pixels": 9}, {"min_pixels": 10}, "messages[0].content[1].max_pixels"),
    ],
)
async def test_a_resolution_that_cannot_be_had_is_refused_by_name(server, client, fields, settings, param):
    messages = chat(drawn(1), **fields)

    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(
            model=await served_name(client), messages=messages, extra_body={"mm_processor_kwargs": settings}
        )

    assert refused.value.param == param
    assert tokens_before(server.url, messages, mm_processor_kwargs=settings) == (400, "invalid_value")


async def test_tools_are_in_the_prompt_and_a_picture_may_be_a_result(client):
    """The embedded model was not trained to call; what is shown is that all of it reaches the model, whole and streamed alike."""
    tool = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    picture = {"type": "image_url", "image_url": {"url": data_url(drawn(2))}}
    turns = [
        {"role": "user", "content": "Describe the image please"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [picture, {"type": "text", "text": "Describe the image please"}]},
    ]
    fields = {"model": await served_name(client), "messages": turns, "temperature": 0, "max_tokens": 24}

    plain = await client.chat.completions.create(**fields)
    whole = await client.chat.completions.create(**fields, tools=[tool])
    stream = await client.chat.completions.create(**fields, tools=[tool], stream=True)
    streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert whole.usage.prompt_tokens > plain.usage.prompt_tokens
    assert whole.usage.prompt_tokens_details.model_dump()["image_tokens"] == 64
    assert streamed == (whole.choices[0].message.content or "")


async def test_a_client_that_leaves_while_streaming_frees_its_blocks(server, client):
    stream = await client.chat.completions.create(
        model=await served_name(client), messages=conversation(1), max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    await anext(aiter(stream))
    assert server.metric("vlm:num_requests_running") == 1

    await stream.close()

    await gone_within(server, GONE_WITHIN_S)


async def test_a_client_that_leaves_while_its_picture_downloads_frees_the_download(server, client):
    async with picture_server() as (url, is_asked):
        message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
        asking = asyncio.create_task(client.chat.completions.create(model=await served_name(client), messages=[message]))
        await asyncio.wait_for(is_asked.wait(), 10)
        assert server.metric('vlm:pictures_in_flight{stage="fetch"}') == 1

        asking.cancel()

        await gone_within(server, GONE_WITHIN_S)


async def gone_within(server: ServerProcess, seconds: float) -> None:
    """Nothing of any request is left: no blocks, no downloads, no part of a budget."""
    deadline = time.monotonic() + seconds
    gauges = ["vlm:num_referenced_blocks", "vlm:num_requests_running", "vlm:num_requests_waiting", 'vlm:pictures_in_flight{stage="fetch"}']
    gauges += [f'vlm:budget_used{{budget="{name}"}}' for name in ("media_bytes", "pixels", "descriptors", "downloads", "queued_tokens")]
    while left := {gauge: value for gauge in gauges if (value := server.metric(gauge))}:
        assert time.monotonic() < deadline, f"after {seconds} s there is still {left}"
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def picture_server() -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A loopback server that reads a request for a picture and never answers it."""
    is_asked, may_end = asyncio.Event(), asyncio.Event()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        is_asked.set()
        await may_end.wait()
        writer.close()

    listener = await asyncio.start_server(take, "127.0.0.1", 0)
    async with listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/picture.png", is_asked
        may_end.set()


async def test_a_killed_engine_costs_its_requests_an_error_and_nothing_more(server, client):
    """Last in this file: the engine starts anew."""
    name = await served_name(client)
    stream = await client.chat.completions.create(
        model=name, messages=conversation(1), max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    await anext(aiter(stream))

    os.kill(server.engine_id, signal.SIGKILL)
    killed_at = time.monotonic()

    with pytest.raises(openai.APIError):
        async for _ in stream:
            pass
    assert time.monotonic() - killed_at < 2
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/health") as response:
        assert response.status == 503
        assert response.headers["Retry-After"]
    with pytest.raises(openai.APIStatusError) as refused:
        await client.chat.completions.create(model=name, messages=conversation(1), max_tokens=1)
    assert refused.value.status_code == 503
    server.wait_for_health(200, timeout_s=20)
    assert await streamed(client, 1)
