"""Tools and reasoning by the official SDK against a real HTTP server, its helpers included."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from tests.contract.running import RunningServer, fake_config, running_server
from tests.vlm_server.byte_tokenizer import EOS

ASK: Any = [{"role": "user", "content": "How is the weather in Hangzhou?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ARGUMENTS = '{"city": "杭州"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
THOUGHT = "<think>\nI must look.\n</think>\n\n"


@pytest.fixture(scope="module")
def thinking_server() -> Iterator[RunningServer]:
    with running_server(fake_config(reasoning_parser="deepseek-r1")) as server:
        yield server


@pytest.fixture
def client(thinking_server: RunningServer) -> Iterator[OpenAI]:
    """Checks every answer strictly against the SDK's own types."""
    thinking_server.backend.reset()
    with OpenAI(api_key="none", base_url=f"{thinking_server.url}/v1", max_retries=0, _strict_response_validation=True) as client:
        yield client


@pytest.fixture
def says(thinking_server: RunningServer, client: OpenAI) -> Any:
    """Sets what the model writes."""

    def says(text: str) -> None:
        thinking_server.backend.engine.script = lambda prompt, params: [*text.encode(), EOS]

    return says


def ask(client: OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "org/tiny-vlm", "messages": ASK, "tools": [WEATHER], **fields})


def test_a_call_is_parsed_and_its_result_can_be_sent_back(client: OpenAI, says: Any) -> None:
    says(THOUGHT + CALL)
    answer = ask(client)

    assert isinstance(answer, ChatCompletion)
    [choice] = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "get_weather", {"city": "杭州"})
    assert choice.message.model_dump()["reasoning_content"] == "I must look."
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("\nI must look.\n")
    says("It is sunny.")
    again = ask(client, messages=[*ASK, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "Sunny"}])
    assert again.choices[0].message.content == "It is sunny."
    assert "warnings" not in again.model_dump()


def test_streamed_chunks_are_the_call_in_pieces(client: OpenAI, says: Any) -> None:
    says("Let me look.\n" + CALL + "\n" + CALL)

    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))

    assert all(isinstance(chunk, ChatCompletionChunk) for chunk in chunks)
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == 0
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    pieces = [piece for choice in choices for piece in choice.delta.tool_calls or ()]
    firsts = [piece for piece in pieces if piece.id]
    assert [(first.index, first.type, first.function.name) for first in firsts] == [
        (0, "function", "get_weather"),
        (1, "function", "get_weather"),
    ]
    assert len({first.id for first in firsts}) == 2
    for index in (0, 1):
        assert "".join(piece.function.arguments for piece in pieces if piece.index == index) == ARGUMENTS
    assert "".join(choice.delta.content or "" for choice in choices) == "Let me look."
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["tool_calls"]


def test_the_stream_helper_puts_calls_together(client: OpenAI, says: Any) -> None:
    says(THOUGHT + "Let me look.\n" + CALL + "\n" + CALL)

    with client.chat.completions.stream(model="org/tiny-vlm", messages=ASK, tools=[WEATHER]) as stream:
        kinds = [event.type for event in stream]
        completion = stream.get_final_completion()

    message = completion.choices[0].message
    assert message.content == "Let me look."
    assert [call.function.arguments for call in message.tool_calls or ()] == [ARGUMENTS, ARGUMENTS]
    assert message.model_dump()["reasoning_content"] == "I must look."
    assert completion.choices[0].finish_reason == "tool_calls"
    assert kinds.count("tool_calls.function.arguments.done") == 2
    assert kinds.count("content.done") == 1


def test_the_stream_helper_leaves_content_null_where_there_is_only_a_call(client: OpenAI, says: Any) -> None:
    says(CALL)

    with client.chat.completions.stream(model="org/tiny-vlm", messages=ASK, tools=[WEATHER], n=2) as stream:
        choices = stream.until_done().get_final_completion().choices

    assert [choice.message.content for choice in choices] == [None, None]
    assert len({call.id for choice in choices for call in choice.message.tool_calls or ()}) == 2


class GetWeather(BaseModel):
    city: Literal["杭州"]


def test_the_parse_helper_makes_arguments_a_model(client: OpenAI, says: Any) -> None:
    says(CALL.replace("get_weather", "GetWeather"))

    completion = client.chat.completions.parse(model="org/tiny-vlm", messages=ASK, tools=[openai.pydantic_function_tool(GetWeather)])

    [call] = completion.choices[0].message.tool_calls or ()
    assert call.function.parsed_arguments == GetWeather(city="杭州")


def test_the_stream_helper_parses_arguments_while_they_come(client: OpenAI, says: Any) -> None:
    says(CALL.replace("get_weather", "GetWeather"))

    tool = openai.pydantic_function_tool(GetWeather)
    with client.chat.completions.stream(model="org/tiny-vlm", messages=ASK, tools=[tool], tool_choice="required") as stream:
        completion = stream.until_done().get_final_completion()

    [call] = completion.choices[0].message.tool_calls or ()
    assert call.function.parsed_arguments == GetWeather(city="杭州")
