"""OpenAI's client and `/v1/responses`, strictly: what it makes of an answer that lacks a field is an error."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.contract.fake_engine import DEFAULT_REPLY
from tests.contract.running import RunningServer, fake_config, running_server
from tests.vlm_server.byte_tokenizer import EOS
from vlm_server.examples import RED_CIRCLE

MODEL = "org/tiny-vlm"
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False},
    "strict": True,
}
ARGUMENTS = '{"city": "杭州"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
THOUGHT = "<think>\nI must look.\n</think>\n\n"


@pytest.fixture(scope="module")
def thinking_server() -> Iterator[RunningServer]:
    with running_server(fake_config(reasoning_parser="deepseek-r1", api_keys=("first", "second"))) as server:
        yield server


@pytest.fixture
def client(thinking_server: RunningServer) -> Iterator[OpenAI]:
    thinking_server.backend.reset()
    with client_of(thinking_server, "first") as client:
        yield client


def client_of(server: RunningServer, key: str) -> OpenAI:
    return OpenAI(api_key=key, base_url=f"{server.url}/v1", max_retries=0, _strict_response_validation=True)


@pytest.fixture
def says(thinking_server: RunningServer) -> Any:
    """Has the model write a text."""

    def script(text: str) -> None:
        thinking_server.backend.engine.script = lambda prompt, params: [*text.encode(), EOS]

    return script


def asked(server: RunningServer) -> str:
    """The prompt that the engine got last."""
    token_ids = server.backend.engine.requests[-1][0].token_ids
    return bytes(token_id for token_id in token_ids if token_id < 256).decode()


def test_a_response_has_text_and_usage(client: OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="Hello!", instructions="Be kind.", metadata={"a": "b"}, max_output_tokens=100)

    assert (response.status, response.output_text, response.metadata) == ("completed", DEFAULT_REPLY, {"a": "b"})
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.usage.input_tokens_details.cached_tokens == 2
    assert response.output[0].id != response.id


def test_a_picture_is_seen(client: OpenAI, thinking_server: RunningServer) -> None:
    parts: Any = [{"type": "input_text", "text": "Describe it"}, {"type": "input_image", "image_url": RED_CIRCLE, "detail": "auto"}]

    response = client.responses.create(model=MODEL, input=[{"role": "user", "content": parts}])

    assert response.output_text == DEFAULT_REPLY
    assert len(thinking_server.backend.engine.requests[-1][0].images) == 1


def test_an_answer_that_is_cut_is_incomplete(client: OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="Hello!", max_output_tokens=5)

    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    [message] = response.output
    assert message.type == "message"
    assert message.status == "incomplete"


def test_events_are_openais_and_end_in_the_response(client: OpenAI, says: Any) -> None:
    says(THOUGHT + "Let me look.\n" + CALL)

    events = list(client.responses.create(model=MODEL, input="How is the weather?", tools=[WEATHER], stream=True))

    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_text.delta",
        "response.output_text.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.completed",
    ]
    last = events[-1]
    assert last.type == "response.completed"
    assert client.responses.retrieve(last.response.id).model_dump() == last.response.model_dump()
    assert [item.type for item in last.response.output] == ["reasoning", "message", "function_call"]


def test_a_call_is_answered_with_its_output(client: OpenAI, says: Any, thinking_server: RunningServer) -> None:
    says(THOUGHT + CALL)
    first = client.responses.create(model=MODEL, input="How is the weather?", tools=[WEATHER])
    thought, call = first.output
    assert thought.type == "reasoning"
    assert call.type == "function_call"
    assert (call.name, call.arguments) == ("get_weather", ARGUMENTS)
    says("It is sunny.")
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"}

    kept = client.responses.create(model=MODEL, input=[output], previous_response_id=first.id, tools=[WEATHER])
    prompt = asked(thinking_server)
    sent: Any = [{"role": "user", "content": "How is the weather?"}, *(item.model_dump() for item in first.output), output]
    again = client.responses.create(model=MODEL, input=sent, tools=[WEATHER])

    assert kept.output_text == again.output_text == "It is sunny."
    assert asked(thinking_server) == prompt
    assert prompt.index("How is the weather?") < prompt.index("get_weather", 200) < prompt.index("tool: Sunny")


def test_the_stream_helper_gives_the_final_response(client: OpenAI, says: Any) -> None:
    says(THOUGHT + "Hello!")

    with client.responses.stream(model=MODEL, input="Hi") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()

    assert text == final.output_text == "Hello!"
    assert final.output[0].type == "reasoning"


class Seen(BaseModel):
    colour: Literal["red", "green"]


def test_the_parse_helper_makes_the_answer_a_model(client: OpenAI, says: Any) -> None:
    says('{"colour": "red"}')

    response = client.responses.parse(model=MODEL, input="Which colour?", text_format=Seen)

    assert response.output_parsed == Seen(colour="red")


class GetWeather(BaseModel):
    city: Literal["杭州"]


def test_the_parse_helper_makes_arguments_a_model(client: OpenAI, says: Any) -> None:
    says(CALL.replace("get_weather", "GetWeather"))

    response = client.responses.parse(model=MODEL, input="How is the weather?", tools=[openai.pydantic_function_tool(GetWeather)])

    [call] = response.output
    assert call.type == "function_call"
    assert call.parsed_arguments == GetWeather(city="杭州")


def test_log_probabilities_are_those_of_the_message(client: OpenAI, says: Any) -> None:
    says(THOUGHT + "Hi")
    fields: Any = {"model": MODEL, "input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2}

    whole = client.responses.create(**fields)
    final = list(client.responses.create(**fields, stream=True))[-1]

    for response in (whole, final.response):
        [part] = response.output[1].content
        assert [entry.token for entry in part.logprobs] == ["H", "i"]
        assert [len(entry.top_logprobs) for entry in part.logprobs] == [2, 2]


def test_a_response_is_found_listed_and_deleted(client: OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="One")
    second = client.responses.create(model=MODEL, input="Two", previous_response_id=first.id)

    items = list(client.responses.input_items.list(second.id, limit=2, order="asc"))
    client.responses.delete(first.id)

    assert [item.role for item in items if item.type == "message"] == ["user", "assistant", "user"]
    assert client.responses.retrieve(second.id).output_text == DEFAULT_REPLY
    assert client.responses.create(model=MODEL, input="Three", previous_response_id=second.id).status == "completed"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(second.id)


def test_another_key_finds_nothing(client: OpenAI, thinking_server: RunningServer) -> None:
    kept = client.responses.create(model=MODEL, input="One")

    with client_of(thinking_server, "second") as other:
        for ask in (other.responses.retrieve, other.responses.delete, other.responses.cancel, other.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                ask(kept.id)
        with pytest.raises(openai.NotFoundError) as error:
            other.responses.create(model=MODEL, input="Two", previous_response_id=kept.id)

    assert error.value.code == "previous_response_not_found"
    assert client.responses.retrieve(kept.id).id == kept.id


def test_every_event_and_response_is_of_openais_shape(client: OpenAI, says: Any) -> None:
    says(THOUGHT + "Hi\n" + CALL)
    fields: Any = {"model": MODEL, "input": "x", "tools": [WEATHER], "include": ["message.output_text.logprobs"]}

    with client.responses.with_streaming_response.create(**fields, stream=True) as response:
        lines = list(response.iter_lines())

    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [line.removeprefix("event: ") for line in lines if line.startswith("event: ")] == [event["type"] for event in events]
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event)
    assert Response.model_validate(events[-1]["response"]).output_text == "Hi"
