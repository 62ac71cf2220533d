"""Anthropic's SDK and the embedded model: real pictures, the real prefix cache, real stop strings."""

import base64
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.end_to_end.pictures import drawn
from tests.server_process import ServerProcess, data_url, server_process

QUESTION = "Describe the image please"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with server_process(None) as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(api_key="none", base_url=server.url, max_retries=0, _strict_response_validation=True) as client:
        yield client


def picture(number: int) -> Any:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": base64.b64encode(drawn(number)).decode()}}


def asking(client: anthropic.Anthropic, number: int, **fields: Any) -> Any:
    messages = [{"role": "user", "content": [picture(number), {"type": "text", "text": QUESTION}]}]
    model = client.models.list().data[0].id
    return {"model": model, "max_tokens": 24, "messages": messages, "extra_body": {"temperature": 0}, **fields}


@pytest.mark.full
def test_a_picture_gets_the_answer_and_the_count_of_openais_route(server: ServerProcess, client: anthropic.Anthropic) -> None:
    parts: Any = [{"type": "image_url", "image_url": {"url": data_url(drawn(2))}}, {"type": "text", "text": QUESTION}]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as other:
        model = other.models.list().data[0].id
        completion = other.chat.completions.create(model=model, messages=[{"role": "user", "content": parts}], max_tokens=24, temperature=0)
    counted = client.messages.count_tokens(model=model, messages=asking(client, 2)["messages"]).input_tokens

    whole = client.messages.create(**asking(client, 2))
    with client.messages.stream(**asking(client, 2)) as stream:
        streamed = stream.get_final_message()

    assert whole.content[0].text == streamed.content[0].text == completion.choices[0].message.content  # type: ignore[union-attr]
    assert whole.stop_reason == streamed.stop_reason
    assert completion.usage is not None
    for usage in (whole.usage, streamed.usage):
        assert usage.cache_read_input_tokens > 0  # type: ignore[operator]
        assert usage.input_tokens + usage.cache_read_input_tokens == completion.usage.prompt_tokens == counted  # type: ignore[operator]


@pytest.mark.full
def test_a_real_answer_ends_at_a_stop_sequence_and_goes_on_behind_it(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(**asking(client, 4)).content[0].text  # type: ignore[union-attr]
    word = answer.split()[2]
    start = answer.partition(word)[0].rstrip()

    stopped = client.messages.create(**asking(client, 4, stop_sequences=[word]))
    turns = [*asking(client, 4)["messages"], {"role": "assistant", "content": start}]
    continued = client.messages.create(**asking(client, 4, messages=turns))

    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)
    assert stopped.content[0].text.rstrip() == start  # type: ignore[union-attr]
    assert start + continued.content[0].text == answer  # type: ignore[union-attr]


@pytest.mark.full
def test_a_result_may_be_a_picture_and_tools_are_counted(client: anthropic.Anthropic) -> None:
    tool: Any = {"name": "look", "description": "Looks.", "input_schema": {"type": "object", "properties": {}}}
    turns: Any = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": [picture(2)]}]},
    ]
    fields = asking(client, 2, messages=turns, tools=[tool])

    usage = client.messages.create(**fields).usage

    counted = client.messages.count_tokens(model=fields["model"], messages=turns, tools=[tool]).input_tokens
    assert counted == usage.input_tokens + usage.cache_read_input_tokens  # type: ignore[operator]
    assert counted > client.messages.count_tokens(model=fields["model"], messages=turns).input_tokens > 64
