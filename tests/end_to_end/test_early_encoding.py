"""A prompt whose last picture is slow to come: those before it are encoded meanwhile, and the answer is what it would have been."""

import asyncio

import openai
import pytest

from tests.end_to_end.pictures import drawn
from tests.image_fixtures import tiny_folder
from tests.server_process import ServerProcess, server_process
from tests.vision.picture_server import Gate, PictureServer, body
from tests.vision.processes import until

WAIT_S = 60


@pytest.mark.full
async def test_the_first_pictures_are_encoded_before_the_last_one_has_arrived():
    """One server process for those who wait and those who leave: starting one takes seconds."""
    origin = PictureServer()
    origin.pages |= {f"/{number}": body(drawn(number)) for number in range(4)}
    last = origin.pages["/last"] = Gate(drawn(9))
    never = origin.pages["/never"] = Gate(drawn(10))
    await origin.open()
    with server_process(tiny_folder("llava"), "--allow-private-media", "127.0.0.0/8") as server:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            asking = asyncio.create_task(answer(client, [origin.url(path) for path in ("/0", "/last", "/1")]))
            await until_encoded(server, 2)
            assert (last.num_waiting, asking.done()) == (1, False)
            last.is_open.set()
            early = await asking
            await until_encoded(server, 3)

            leaving = asyncio.create_task(answer(client, [origin.url(path) for path in ("/2", "/never", "/3")]))
            await until_encoded(server, 5)
            leaving.cancel()
            await until(lambda: never.num_left == 1)
            assert await asyncio.to_thread(server.metric, "vlm:num_referenced_blocks") == 0
            assert await asyncio.to_thread(server.metric, "vlm:num_images_waiting") == 0
    with server_process(tiny_folder("llava"), "--allow-private-media", "127.0.0.0/8") as server:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            assert await answer(client, [origin.url(path) for path in ("/0", "/last", "/1")]) == early
    await origin.close()


async def answer(client: openai.AsyncOpenAI, urls: list[str]) -> str | None:
    model = (await client.models.list()).data[0].id
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    chat = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], max_tokens=8, temperature=0, logprobs=True
    )
    return chat.choices[0].message.content


async def until_encoded(server: ServerProcess, count: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while (encoded := await asyncio.to_thread(server.metric, "vlm:images_encoded_total")) != count:
            assert encoded < count
