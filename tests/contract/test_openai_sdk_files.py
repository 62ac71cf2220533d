"""The official SDK's `client.files` against a real HTTP server; every answer is checked against the SDK's own types."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import FileDeleted, FileObject

from tests.contract.running import RunningServer
from vlm_server.examples import RED_CIRCLE

PNG = base64.b64decode(RED_CIRCLE.partition(",")[2])


@pytest.fixture
def client(server: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0, _strict_response_validation=True) as client:
        yield client
        for file in client.files.list():
            client.files.delete(file.id)


def test_a_file_goes_through_its_whole_life(client: OpenAI) -> None:
    file = client.files.create(file=("circle.png", PNG, "image/png"), purpose="vision")

    assert FileObject.model_validate(file.model_dump(), strict=True) == file
    assert file.expires_at
    assert (file.bytes, file.filename, file.purpose, file.status) == (len(PNG), "circle.png", "vision", "processed")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == PNG
    assert client.files.wait_for_processing(file.id) == file
    deleted = client.files.delete(file.id)
    assert FileDeleted.model_validate(deleted.model_dump(), strict=True).deleted
    with pytest.raises(openai.NotFoundError) as refusal:
        client.files.retrieve(file.id)
    assert refusal.value.code == "file_not_found"


def test_a_file_may_be_a_path_an_open_file_or_bytes(client: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "a b.png"
    path.write_bytes(PNG)

    for source in (path, io.BytesIO(PNG), PNG):
        assert client.files.content(client.files.create(file=source, purpose="user_data").id).content == PNG


def test_an_expiry_is_counted_from_the_upload(client: OpenAI) -> None:
    file = client.files.create(file=PNG, purpose="assistants", expires_after={"anchor": "created_at", "seconds": 3600})

    assert file.expires_at == file.created_at + 3600


def test_the_list_is_paged_through_by_itself(client: OpenAI) -> None:
    ids = [client.files.create(file=PNG[:100] + bytes([number]), purpose="vision").id for number in range(5)]

    assert [file.id for file in client.files.list(limit=2, order="asc")] == ids
    assert [file.id for file in client.files.list(limit=2)] == ids[::-1]
    assert client.files.list(limit=5).has_next_page() is False
    assert client.files.list(purpose="batch").data == []


def test_what_is_refused_names_its_field(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.files.create(file=b"{}", purpose="batch")
    assert refusal.value.param == "purpose"
    with pytest.raises(openai.BadRequestError) as refusal:
        client.files.create(file=b"a bad picture", purpose="vision")
    assert (refusal.value.param, refusal.value.code) == ("file", "image_decode_failed")


def test_a_chat_answers_about_an_uploaded_picture_as_about_a_data_url(client: OpenAI, server: RunningServer) -> None:
    file = client.files.create(file=("circle.png", PNG), purpose="vision")

    answers = [
        client.chat.completions.create(
            model=server.model,
            messages=[
                {"role": "user", "content": [{"type": "text", "text": "Describe the image"}, {"type": "image_url", "image_url": image}]}  # type: ignore[list-item]
            ],
        )
        for image in ({"file_id": file.id}, {"url": RED_CIRCLE})
    ]

    assert answers[0].choices == answers[1].choices
    assert answers[0].usage == answers[1].usage
    [by_id, by_url] = server.backend.engine.requests
    assert by_id[0].images == by_url[0].images
    assert by_id[0].cache_keys == by_url[0].cache_keys


async def test_the_async_client_streams_a_file_up_and_down(server: RunningServer) -> None:
    data = PNG + bytes(3_000_000)
    async with AsyncOpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0, timeout=30) as client:
        file = await client.files.create(file=io.BytesIO(data), purpose="vision")
        async with client.files.with_streaming_response.content(file.id) as response:
            assert b"".join([piece async for piece in response.iter_bytes()]) == data
        await client.files.delete(file.id)
