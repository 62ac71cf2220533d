"""Anthropic's official SDK against a real HTTP server, its helpers and its strict parsing included."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic
from anthropic.types import Message, TextBlock, ThinkingBlock, ToolUseBlock
from pydantic import BaseModel

from engine.request import EngineDeadError, Prompt, QueueFullError, SamplingParams
from tests.contract.fake_engine import DEFAULT_REPLY, TOKENS_PER_IMAGE
from tests.contract.running import MODEL, RunningServer, fake_config, running_server
from tests.vlm_server.byte_tokenizer import EOS
from vlm_server.examples import RED_CIRCLE

HELLO: Any = [{"role": "user", "content": "Hello! How are you?"}]
PICTURE: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": RED_CIRCLE.partition(",")[2]}}
LOOK: Any = [{"role": "user", "content": [{"type": "text", "text": "Describe the image please"}, PICTURE]}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ARGUMENTS = '{"city": "杭州"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
THOUGHT = "<think>\nI must look.\n</think>\n\n"


@pytest.fixture(scope="module")
def thinking_server() -> Iterator[RunningServer]:
    with running_server(fake_config(reasoning_parser="deepseek-r1", api_keys=("secret", "other"))) as server:
        yield server


@pytest.fixture
def server(thinking_server: RunningServer) -> RunningServer:
    thinking_server.backend.reset()
    return thinking_server


@pytest.fixture(params=["", "/anthropic"])
def client(server: RunningServer, request: pytest.FixtureRequest) -> Iterator[Anthropic]:
    """Checks every answer strictly against the SDK's own types; with each of the addresses that it may be given."""
    with new_client(server, prefix=request.param) as client:
        yield client


def new_client(server: RunningServer, *, prefix: str = "", key: str = "secret") -> Anthropic:
    return Anthropic(api_key=key, base_url=server.url + prefix, max_retries=0, _strict_response_validation=True)


def says(server: RunningServer, text: str) -> None:
    server.backend.engine.script = lambda prompt, params: [*text.encode(), EOS]


def ask(client: Anthropic, **fields: Any) -> Any:
    return client.messages.create(**{"model": MODEL, "messages": HELLO, "max_tokens": 256, **fields})


def test_an_answer_is_a_message_of_one_text(server: RunningServer, client: Anthropic) -> None:
    message = ask(client, system="Be brief.", extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 5})

    assert isinstance(message, Message)
    assert message.content == [TextBlock(type="text", text=DEFAULT_REPLY)]
    assert (message.role, message.model, message.stop_reason, message.stop_sequence) == ("assistant", MODEL, "end_turn", None)
    assert message.id.startswith("msg_")
    assert message._request_id
    assert "warnings" not in message.model_dump()
    [(_, params)] = server.backend.engine.requests
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.5, 0.9, 5, 256)


def test_a_picture_and_its_count_are_the_prompts(server: RunningServer, client: Anthropic) -> None:
    usage = ask(client, messages=LOOK).usage

    [(prompt, _)] = server.backend.engine.requests
    assert [image.content_hash.decode() for image in prompt.images] == [RED_CIRCLE]
    assert usage.input_tokens + usage.cache_read_input_tokens == len(prompt.token_ids)
    assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (2, 0)  # the scripted engine always has two
    assert usage.output_tokens == len(DEFAULT_REPLY.encode()) + 1


def test_a_stream_helper_gives_the_same_message(server: RunningServer, client: Anthropic) -> None:
    says(server, THOUGHT + "Let me look.\n" + CALL)
    fields: Any = {"model": MODEL, "messages": LOOK, "max_tokens": 256, "tools": [WEATHER]}
    whole = client.messages.create(**fields)

    with client.messages.stream(**fields) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()

    assert text == "Let me look."
    assert without_ids(message) == without_ids(whole)


def without_ids(message: Message) -> Any:
    content = json.loads(message.model_dump_json(exclude={"id": True, "content": {"__all__": {"id"}}}))
    for block in content["content"]:
        block.pop("parsed_output", None)  # the helper's own
    return content


def test_raw_events_come_in_anthropics_order(server: RunningServer, client: Anthropic) -> None:
    says(server, THOUGHT + "Hi!" + CALL)

    events = list(ask(client, tools=[WEATHER], stream=True))

    kinds = [event.type if event.type != "content_block_delta" else event.delta.type for event in events]
    assert list(dict.fromkeys(kinds)) == [
        *("message_start", "content_block_start", "thinking_delta", "signature_delta", "content_block_stop"),
        *("text_delta", "input_json_delta", "message_delta", "message_stop"),
    ]
    starts = [(event.index, event.content_block.type) for event in events if event.type == "content_block_start"]
    assert starts == [(0, "thinking"), (1, "text"), (2, "tool_use")]
    assert [event.index for event in events if event.type == "content_block_stop"] == [0, 1, 2]
    assert events[0].message.content == []
    assert events[0].message.usage.input_tokens > 0
    assert events[-2].delta.stop_reason == "tool_use"
    assert events[-2].usage.output_tokens > events[0].message.usage.output_tokens


def test_a_call_is_a_tool_use_and_its_result_with_a_picture_can_be_sent_back(server: RunningServer, client: Anthropic) -> None:
    says(server, THOUGHT + CALL)
    answer = ask(client, tools=[WEATHER])

    assert answer.stop_reason == "tool_use"
    thought, call = answer.content
    assert isinstance(thought, ThinkingBlock)
    assert thought.thinking == "I must look."
    assert isinstance(call, ToolUseBlock)
    assert (call.name, call.input) == ("get_weather", {"city": "杭州"})
    assert answer.usage.output_tokens_details.thinking_tokens == len("\nI must look.\n")
    says(server, "It is sunny.")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Sunny"}, PICTURE]}
    again = ask(client, tools=[WEATHER], messages=[*HELLO, answer.to_param(), {"role": "user", "content": [result]}])
    assert again.content == [TextBlock(type="text", text="It is sunny.")]
    assert "warnings" not in again.model_dump()
    prompt = server.backend.engine.requests[-1][0]
    assert [(span.num_tokens, span.image) for span in prompt.spans] == [(TOKENS_PER_IMAGE, 0)]


def test_the_sdks_tool_runner_goes_on_to_the_last_answer(server: RunningServer, client: Anthropic) -> None:
    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather of a city."""
        return f"sunny in {city}"

    def script(prompt: Prompt, params: SamplingParams) -> list[int]:
        has_result = "sunny in 杭州".encode() in bytes(token_id for token_id in prompt.token_ids if token_id < 256)
        return [*("It is sunny." if has_result else THOUGHT + CALL).encode(), EOS]

    server.backend.engine.script = script

    last = client.beta.messages.tool_runner(model=MODEL, max_tokens=256, messages=HELLO, tools=[get_weather]).until_done()

    assert [block.text for block in last.content if block.type == "text"] == ["It is sunny."]


def test_an_eager_tool_gets_its_input_as_it_is_written(server: RunningServer, client: Anthropic) -> None:
    says(server, CALL)

    pieces = [
        event.delta.partial_json
        for event in ask(client, tools=[{**WEATHER, "eager_input_streaming": True}], stream=True)
        if event.type == "content_block_delta"
    ]

    assert len(pieces) > 5
    assert "".join(pieces) == ARGUMENTS


def test_the_matching_stop_sequence_is_named(client: Anthropic) -> None:
    message = ask(client, stop_sequences=["nothing", "This is"])

    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "This is")
    assert message.content[0].text == DEFAULT_REPLY.partition("This is")[0]


def test_a_templates_own_stop_word_is_a_plain_end() -> None:
    with running_server() as server:
        server.backend.stop_words = type(server.backend.stop_words)(strings=("This is",))
        with new_client(server) as client:
            message = ask(client)

    assert message.content[0].text
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)


@pytest.mark.parametrize(("max_tokens", "reason"), [(5, "max_tokens"), (20_000, "model_context_window_exceeded")])
def test_a_cut_answer_says_which_limit_cut_it(server: RunningServer, client: Anthropic, max_tokens: int, reason: str) -> None:
    server.backend.engine.script = lambda prompt, params: list(b"word " * 200)

    assert ask(client, max_tokens=max_tokens).stop_reason == reason
    with client.messages.stream(model=MODEL, messages=HELLO, max_tokens=max_tokens) as stream:
        assert stream.get_final_message().stop_reason == reason


def test_a_last_message_of_the_assistant_is_continued(server: RunningServer, client: Anthropic) -> None:
    ask(client, messages=[*HELLO, {"role": "assistant", "content": "I am"}])

    prompt = server.backend.engine.requests[-1][0]
    assert bytes(prompt.token_ids[1:]).decode().endswith("assistant: I am")


def test_counted_tokens_are_the_input_of_the_answer(client: Anthropic) -> None:
    fields: Any = {"model": MODEL, "messages": LOOK, "system": "Be brief.", "tools": [WEATHER], "tool_choice": {"type": "auto"}}

    counted = client.messages.count_tokens(**fields).input_tokens

    usage = client.messages.create(**fields, max_tokens=4).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


def test_an_answer_is_parsed_into_a_type(server: RunningServer, client: Anthropic) -> None:
    class Seen(BaseModel):
        colour: str

    says(server, '{"colour": "red"}')

    parsed = client.messages.parse(model=MODEL, messages=LOOK, max_tokens=64, output_format=Seen)

    assert parsed.parsed_output == Seen(colour="red")
    assert server.backend.engine.requests[-1][1].grammar is not None


def test_the_models_are_listed_and_found_by_id(client: Anthropic) -> None:
    [model] = list(client.models.list())

    assert (model.type, model.id, model.display_name) == ("model", MODEL, MODEL)
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("no/such")


ERRORS: Any = [
    ({"model": "no/such"}, anthropic.NotFoundError, "not_found_error", "model_not_found"),
    ({"max_tokens": 0}, anthropic.BadRequestError, "invalid_request_error", "invalid_value"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, anthropic.BadRequestError, "invalid_request_error", "context_length_exceeded"),
]


@pytest.mark.parametrize(("fields", "kind", "name", "code"), ERRORS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_the_sdks_exception(client: Anthropic, fields: Any, kind: Any, name: str, code: str, stream: bool) -> None:
    with pytest.raises(kind) as caught:
        ask(client, **fields, stream=stream)

    error = caught.value
    assert (error.type, error.error_code) == (name, code)
    assert error.request_id == error.body["request_id"]
    assert set(error.body) == {"type", "error", "request_id"}


def test_a_full_queue_and_a_dead_engine_are_told_apart(server: RunningServer, client: Anthropic) -> None:
    server.backend.engine.refusal = QueueFullError("3 requests wait")
    with pytest.raises(anthropic.RateLimitError) as full:
        ask(client)
    server.backend.engine.refusal = EngineDeadError("the engine process ended")
    with pytest.raises(anthropic.ServiceUnavailableError) as dead:
        ask(client)

    assert (full.value.type, dead.value.type) == ("rate_limit_error", "overloaded_error")
    assert full.value.response.headers["retry-after"]
    assert dead.value.response.headers["retry-after"]


def test_a_wrong_key_is_an_authentication_error(server: RunningServer) -> None:
    with new_client(server, key="wrong") as client, pytest.raises(anthropic.AuthenticationError) as caught:
        ask(client)

    assert caught.value.type == "authentication_error"
    assert caught.value.request_id == caught.value.body["request_id"]  # type: ignore[index]


def test_a_body_that_is_too_large_and_a_failure_of_ours_are_told_apart() -> None:
    with running_server(fake_config(max_body_bytes=1000)) as server, new_client(server) as client:
        with pytest.raises(anthropic.RequestTooLargeError):
            ask(client, system="x" * 1000)
        server.backend.engine.refusal = RuntimeError("a secret")  # type: ignore[assignment]
        with pytest.raises(anthropic.InternalServerError) as caught:
            ask(client)

    assert caught.value.type == "api_error"
    assert "secret" not in str(caught.value)


def test_an_engine_that_dies_in_a_stream_raises(server: RunningServer, client: Anthropic) -> None:
    server.backend.engine.fails_after = 3

    with pytest.raises(anthropic.APIStatusError) as caught:
        list(ask(client, stream=True))

    assert caught.value.type == "overloaded_error"
    assert caught.value.request_id == caught.value.body["request_id"]  # type: ignore[index]
