"""The official SDK against a real HTTP server. Nothing here knows which engine answers."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.contract.running import RunningServer
from vlm_server.examples import RED_CIRCLE

HELLO = [{"role": "user", "content": "Hello! How are you?"}]
PICTURE = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "Describe the image please"}, {"type": "image_url", "image_url": {"url": RED_CIRCLE}}],
    }
]


@pytest.fixture
def client(server: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(api_key="YOUR_API_KEY", base_url=f"{server.url}/v1", max_retries=0) as client:
        yield client


@pytest.fixture
def model(client: OpenAI) -> str:
    return client.models.list().data[0].id


def chat(client: OpenAI, model: str, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": model, "messages": HELLO, "max_tokens": 64, **fields})


def test_the_model_list_has_the_model_with_its_root(client: OpenAI) -> None:
    [card] = client.models.list().data

    assert card.object == "model"
    assert card.model_dump()["root"]


def test_a_model_is_found_by_its_id_with_slashes(client: OpenAI, model: str) -> None:
    assert client.models.retrieve(model).id == model


def test_a_chat_answers_with_text_and_usage(client: OpenAI, model: str) -> None:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": " provide three suggestions about time management"},
    ]

    completion = chat(client, model, messages=messages, temperature=0.8, top_p=0.8)

    assert completion.object == "chat.completion"
    assert completion.choices[0].message.role == "assistant"
    assert completion.choices[0].message.content
    assert completion.choices[0].finish_reason in ("stop", "length")
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    assert completion.usage.prompt_tokens_details.cached_tokens >= 0


def test_the_role_developer_is_accepted(client: OpenAI, model: str) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, *HELLO]

    assert chat(client, model, messages=messages).choices[0].message.content


def test_a_picture_is_counted_in_the_usage(client: OpenAI, model: str) -> None:
    usage = chat(client, model, messages=PICTURE, temperature=0.8, top_p=0.8).usage

    assert 0 < usage.model_dump()["prompt_tokens_details"]["image_tokens"] < usage.prompt_tokens


def test_a_picture_as_a_bare_string_is_the_same_picture(client: OpenAI, model: str) -> None:
    bare: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": RED_CIRCLE}]}]
    wrapped = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": RED_CIRCLE}}]}]

    first, second = (chat(client, model, messages=messages, temperature=0, max_tokens=8) for messages in (bare, wrapped))

    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.usage.prompt_tokens == second.usage.prompt_tokens


def test_a_stream_gives_the_same_text_as_the_whole_answer(client: OpenAI, model: str) -> None:
    whole = chat(client, model, temperature=0).choices[0].message.content

    chunks = list(chat(client, model, temperature=0, stream=True))

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_streamed_picture_chat_ends_with_the_usage(client: OpenAI, model: str) -> None:
    chunks = list(chat(client, model, messages=PICTURE, stream=True, stream_options={"include_usage": True}))

    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_stream_helper_puts_the_message_together(client: OpenAI, model: str) -> None:
    with client.chat.completions.stream(model=model, messages=HELLO, max_tokens=64, temperature=0) as stream:  # type: ignore[arg-type]
        for _ in stream:
            pass
        message = stream.current_completion_snapshot.choices[0].message

    assert message.role == "assistant"
    assert message.content == chat(client, model, temperature=0).choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_have_their_own_indices(client: OpenAI, model: str, stream: bool) -> None:
    answer = chat(client, model, n=3, seed=5, stream=stream)

    choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    assert {choice.index for choice in choices} == {0, 1, 2}
    assert sum(choice.finish_reason is not None for choice in choices) == 3


def test_a_seed_gives_the_same_answer_twice(client: OpenAI, model: str) -> None:
    first, second = (chat(client, model, seed=7, temperature=1.0, max_tokens=16).choices[0].message.content for _ in range(2))

    assert first == second


def test_the_answer_ends_before_a_stop_string(client: OpenAI, model: str) -> None:
    whole = chat(client, model, temperature=0).choices[0].message.content
    stop = whole[3:6]

    choice = chat(client, model, temperature=0, stop=[stop, "never"]).choices[0]

    assert choice.message.content == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"


def test_a_stop_string_does_not_leak_into_the_stream(client: OpenAI, model: str) -> None:
    whole = chat(client, model, temperature=0).choices[0].message.content
    stop = whole[3:8]

    chunks = list(chat(client, model, temperature=0, stop=stop, stream=True))

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole[: whole.index(stop)]


def test_log_probabilities_have_text_bytes_and_alternatives(client: OpenAI, model: str) -> None:
    choice = chat(client, model, temperature=0, logprobs=True, top_logprobs=2, max_tokens=4).choices[0]

    tokens = choice.logprobs.content
    assert len(tokens) == 4
    assert b"".join(bytes(token.bytes) for token in tokens).decode("utf-8", "ignore") == choice.message.content
    assert all(len(token.top_logprobs) == 2 for token in tokens)
    assert all(token.logprob <= 0 for token in tokens)


def test_streamed_log_probabilities_equal_the_whole_ones(client: OpenAI, model: str) -> None:
    fields: dict[str, Any] = {"temperature": 0, "logprobs": True, "top_logprobs": 1, "max_tokens": 12}
    whole = chat(client, model, **fields).choices[0].logprobs.content

    chunks = list(chat(client, model, stream=True, **fields))

    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.bytes for token in streamed] == [token.bytes for token in whole]


def test_max_completion_tokens_ends_with_length(client: OpenAI, model: str) -> None:
    completion = chat(client, model, max_completion_tokens=3)

    assert completion.usage.completion_tokens == 3
    assert completion.choices[0].finish_reason == "length"


def test_completions_take_a_string_and_lists(client: OpenAI, model: str) -> None:
    prompt = "two steps to build a house:"

    for prompts, number in ((prompt, 1), ([prompt, "hi"], 2), ([5, 6, 7], 1), ([[5, 6], [7]], 2)):
        completion = client.completions.create(model=model, prompt=prompts, max_tokens=4)
        assert [choice.index for choice in completion.choices] == list(range(number))


def test_completions_end_after_16_tokens_by_default(client: OpenAI, model: str) -> None:
    completion = client.completions.create(model=model, prompt="hi", extra_body={"ignore_eos": True})

    assert completion.usage
    assert completion.usage.completion_tokens == 16


def test_completions_stream_several_prompts_with_their_indices(client: OpenAI, model: str) -> None:
    chunks = list(client.completions.create(model=model, prompt=["one", "two"], max_tokens=4, temperature=0, stream=True))

    assert {chunk.choices[0].index for chunk in chunks} == {0, 1}
    whole = client.completions.create(model=model, prompt=["one", "two"], max_tokens=4, temperature=0).choices
    for index in (0, 1):
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices[0].index == index) == whole[index].text


def test_completion_log_probabilities_have_offsets(client: OpenAI, model: str) -> None:
    logprobs = client.completions.create(model=model, prompt="hi", max_tokens=4, logprobs=2, temperature=0).choices[0].logprobs

    assert logprobs
    assert len(logprobs.tokens or []) == len(logprobs.token_logprobs or []) == len(logprobs.text_offset or []) == 4
    assert (logprobs.text_offset or [])[0] == 0


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, "no/such-model")

    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


def test_a_bad_field_is_named(client: OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, model, temperature=3)

    assert caught.value.param == "temperature"
    assert caught.value.code == "invalid_value"
    assert caught.value.type == "invalid_request_error"


def test_a_bad_picture_is_named_by_its_part(client: OpenAI, model: str) -> None:
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,bad/"}}]

    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, model, messages=[{"role": "user", "content": parts}])

    assert caught.value.param == "messages[0].content[1].image_url"
    assert "messages[0].content[1].image_url" in caught.value.message


def test_a_prompt_over_the_window_is_refused_with_both_numbers(client: OpenAI, model: str) -> None:
    window = client.models.retrieve(model).model_dump()["max_model_len"]

    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt=[5] * (window + 10))

    assert caught.value.code == "context_length_exceeded"
    assert str(window) in caught.value.message
    assert str(window + 10) in caught.value.message


def test_the_request_id_is_echoed(client: OpenAI, model: str) -> None:
    response = client.chat.completions.with_raw_response.create(
        model=model,
        messages=HELLO,  # type: ignore[arg-type]
        max_tokens=4,
        extra_headers={"X-Request-Id": "mine-42"},
    )

    assert response.headers["x-request-id"] == "mine-42"
    assert response.parse().choices


async def test_the_async_client_streams_many_chats_at_once(server: RunningServer) -> None:
    async with AsyncOpenAI(api_key="YOUR_API_KEY", base_url=f"{server.url}/v1", max_retries=0) as client:
        model = (await client.models.list()._get_page()).data[0].id  # type: ignore[attr-defined]
        alone = await client.chat.completions.create(model=model, messages=HELLO, max_tokens=16, temperature=0)  # type: ignore[arg-type]

        texts = await asyncio.gather(*(_streamed_text(client, model) for _ in range(16)))

    assert texts == [alone.choices[0].message.content] * 16


async def _streamed_text(client: AsyncOpenAI, model: str) -> str:
    stream: Any = await client.chat.completions.create(
        model=model,
        messages=HELLO,  # type: ignore[arg-type]
        max_tokens=16,
        temperature=0,
        stream=True,
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
