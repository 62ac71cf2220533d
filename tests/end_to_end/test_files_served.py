"""Uploaded pictures and the embedded model: the same answers and embeddings as over data: URLs, and no broken picture is kept."""

from typing import Any

import openai
import pytest

from tests.end_to_end.pictures import drawn
from tests.image_fixtures import tiny_folder
from tests.server_process import data_url, server_process

pytestmark = pytest.mark.full


def described(client: openai.OpenAI, *images: dict[str, str]) -> tuple[str, Any]:
    parts: list[Any] = [{"type": "image_url", "image_url": image} for image in images]
    messages: list[Any] = [{"role": "user", "content": [*parts, {"type": "text", "text": "Describe the image please"}]}]
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=48, logprobs=True)
    return str(answer.choices[0].message.content), (answer.choices[0].logprobs, answer.usage and answer.usage.prompt_tokens)


def test_the_embedded_model_answers_about_an_upload_as_about_the_same_data_url() -> None:
    with server_process(None, "--max-picture-bytes", "100000") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
        for numbers in ((3,), (130,), (3, 130)):
            files = [client.files.create(file=drawn(number), purpose="vision") for number in numbers]
            assert [client.files.content(file.id).content for file in files] == [drawn(number) for number in numbers]

            by_url = described(client, *({"url": data_url(drawn(number))} for number in numbers))
            by_id = described(client, *({"file_id": file.id} for file in files))

            assert by_id == by_url
        num_kept = len(client.files.list().data)
        for data, code in ((b"", "image_decode_failed"), (drawn(3)[:20], "image_decode_failed"), (bytes(100_001), "image_too_large")):
            with pytest.raises(openai.BadRequestError) as refusal:
                client.files.create(file=("x.png", data), purpose="vision")
            assert (refusal.value.code, refusal.value.param) == (code, "file")
        assert len(client.files.list().data) == num_kept == 4


def test_a_model_that_takes_no_pictures_takes_no_uploads(tmp_path: Any) -> None:
    from tests.tiny_models import write_tiny

    with server_process(write_tiny("llama", tmp_path / "llama")) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
        with pytest.raises(openai.BadRequestError, match="takes no pictures"):
            client.files.create(file=drawn(1), purpose="vision")


def test_embeddings_and_token_counts_of_an_upload_are_those_of_the_same_data_url() -> None:
    with server_process(tiny_folder("llava"), "--session-len", "1024") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
        file = client.files.create(file=drawn(7), purpose="vision")
        parts = [[{"type": "image_url", "image_url": image}] for image in ({"file_id": file.id}, {"url": data_url(drawn(7))})]

        first, second = client.embeddings.create(model=client.models.list().data[0].id, input=parts).data  # type: ignore[arg-type]
        counts = [
            client.post("/../tokenize", body={"messages": [{"role": "user", "content": part}]}, cast_to=object)["count"]  # type: ignore[index]
            for part in parts
        ]

    assert first.embedding == second.embedding
    assert counts[0] == counts[1] > 1
