"""What a chat is made of a request of `/v1/responses`, and what the chat's fields are called in the request."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from vlm_server.errors import ApiError, bad_request
from vlm_server.responses.field_paths import FieldPaths, Place
from vlm_server.responses.items import ITEMS, InputImageContent, as_given_back
from vlm_server.responses.request import CreateResponse
from vlm_server.responses.translation import TranslatedChat, chat_part, translated

URL = "https://example.org/a.png"


def chat_of(*, earlier: list[dict[str, Any]] | None = None, **fields: Any) -> TranslatedChat:
    return translated(CreateResponse.model_validate(fields), ITEMS.validate_python(earlier or []), model="m")


def messages_of(*items: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    messages = chat_of(input=list(items), **fields).request.messages
    assert isinstance(messages, list)
    return [message.as_dict() for message in messages]


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def call(call_id: str = "c") -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": "look", "arguments": '{"at": 1}'}


def chat_call(call_id: str = "c") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "look", "arguments": {"at": 1}}}


def thought(text: str) -> dict[str, Any]:
    return {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def thinking(text: str) -> dict[str, Any]:
    return {**said("assistant", ""), "reasoning_content": text}


def output(content: Any, call_id: str = "c") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": content}


def text(words: str) -> dict[str, Any]:
    return {"type": "input_text", "text": words}


def picture(**fields: Any) -> dict[str, Any]:
    return {"type": "input_image", **(fields or {"image_url": URL})}


def test_a_string_is_the_users_message() -> None:
    messages = chat_of(input="hi").request.messages

    assert isinstance(messages, list)
    assert [message.as_dict() for message in messages] == [said("user", "hi")]


def test_parts_are_texts_and_pictures_in_their_order() -> None:
    [message] = messages_of(said("user", [text("a"), picture(image_url=URL, detail="low"), picture(image_url=URL, detail="auto")]))

    assert message["content"] == [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
        {"type": "image_url", "image_url": {"url": URL}},
    ]


def test_a_picture_may_be_a_file_of_the_servers() -> None:
    part = InputImageContent(type="input_image", file_id="file-1", detail="high")

    assert chat_part(part) == {"type": "image_url", "image_url": {"file_id": "file-1", "detail": "high"}}


def test_instructions_and_system_messages_before_the_conversation_are_one_message() -> None:
    messages = messages_of(said("developer", "b"), said("system", [text("c")]), said("user", "d"), said("system", "e"), instructions="a")

    assert messages == [said("system", "a\n\nb\n\nc"), said("user", "d"), said("system", "e")]


def test_a_developers_message_alone_stays_the_developers() -> None:
    assert messages_of(said("developer", "a"), said("user", "b"))[0] == said("developer", "a")


def test_thought_words_and_calls_in_a_row_are_one_message_of_the_assistants() -> None:
    part = {"type": "output_text", "text": "Wait.", "annotations": []}
    items = [said("user", "hi"), thought("Hm."), said("assistant", [part]), call("1"), call("2"), output("x", "1"), output("y", "2")]

    messages = messages_of(*items)

    assert messages[1:] == [
        {**said("assistant", "Wait."), "reasoning_content": "Hm.", "tool_calls": [chat_call("1"), chat_call("2")]},
        {**said("tool", "x"), "tool_call_id": "1"},
        {**said("tool", "y"), "tool_call_id": "2"},
    ]


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([said("assistant", "a"), said("assistant", "b")], [said("assistant", "a"), said("assistant", "b")]),
        ([call(), said("assistant", "b")], [{**said("assistant", "b"), "tool_calls": [chat_call()]}]),
        ([call()], [{**said("assistant", None), "tool_calls": [chat_call()]}]),
        ([thought("a"), thought("b")], [thinking("ab")]),
        (
            [call(), thought("a")],
            [{**said("assistant", None), "tool_calls": [chat_call()]}, thinking("a")],
        ),
        ([said("assistant", [{"type": "refusal", "refusal": "No."}])], [said("assistant", "No.")]),
        (
            [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]}],
            [thinking("s")],
        ),
    ],
)
def test_the_assistants_items_join_only_what_they_follow(items: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert messages_of(*items) == expected


def test_the_output_of_a_call_may_hold_pictures() -> None:
    *_, message = messages_of(call(), output([text("here"), picture()]))

    assert message["content"] == [{"type": "text", "text": "here"}, {"type": "image_url", "image_url": {"url": URL}}]


def test_fields_are_the_chats_under_its_names() -> None:
    schema = {"type": "object"}
    tool = {"type": "function", "name": "look", "parameters": schema, "strict": True}
    request = chat_of(
        input="x",
        max_output_tokens=7,
        reasoning={"effort": "low"},
        text={"format": {"type": "json_schema", "name": "n", "schema": schema}},
        tools=[tool],
        tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "look"}]},
        include=["message.output_text.logprobs"],
        top_logprobs=3,
        top_k=5,
        stop="S",
        seed=9,
    ).request

    assert (request.model, request.max_tokens, request.reasoning_effort, request.num_logprobs) == ("m", 7, "low", 3)
    assert (request.top_k, request.stop, request.seed) == (5, ["S"], 9)
    assert [offered.as_dict() for offered in request.callable_tools()] == [
        {"type": "function", "function": {"name": "look", "parameters": schema, "strict": True}}
    ]
    assert request.response_format is not None
    assert request.response_format.model_dump()["json_schema"]["schema"] == schema


@pytest.mark.parametrize(
    ("choice", "must_call", "num_callable"),
    [("none", False, 0), ("auto", False, 2), ("required", True, 2), ({"type": "function", "name": "f"}, True, 1)],
)
def test_the_choice_of_tools_is_the_chats(choice: Any, must_call: bool, num_callable: int) -> None:
    request = chat_of(input="x", tools=[{"type": "function", "name": name} for name in "fg"], tool_choice=choice).request

    assert (request.must_call, len(request.callable_tools())) == (must_call, num_callable)


EARLIER = [said("user", [picture()]), said("assistant", "ok")]
PATHS = {
    "messages[0].content": "instructions",
    "messages[1].content[0].image_url": "previous_response_id",
    "messages[3].content[1].image_url": "input[0].content[1].image_url",
    "messages[3].content[1].image_url.url": "input[0].content[1].image_url",
    "messages[3].content[1].image_url.detail": "input[0].content[1].detail",
    "messages[3].content[0].text": "input[0].content[0].text",
    "messages[4].tool_calls[0].function.name": "input[2].name",
    "messages[4].tool_calls[0].id": "input[2].call_id",
    "messages[4].content": "input[1].content",
    "messages[5].content[0].image_url": "input[3].output[0].image_url",
    "messages[5].tool_call_id": "input[3].call_id",
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "tools[1].function.parameters": "tools[1].parameters",
    "tools": "tools",
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
    "tool_choice.function.name": "tool_choice.name",
    "tool_choice.allowed_tools.tools[0].function.name": "tool_choice.tools[0].name",
    "reasoning_effort": "reasoning.effort",
    "top_k": "top_k",
    "stop_token_ids[3]": "stop_token_ids[3]",
    "messages[30]": "input[30]",
}


def test_every_field_of_the_chat_has_its_name_in_the_request() -> None:
    new = [said("user", [text("a"), picture()]), said("assistant", "b"), call(), output([picture()])]
    tools = [{"type": "function", "name": name} for name in "fg"]
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]}

    paths = chat_of(earlier=EARLIER, input=new, instructions="i", tools=tools, tool_choice=allowed).paths

    assert {path: paths.of(path) for path in PATHS} == PATHS


_ROLES = st.sampled_from(["user", "assistant", "system", "developer"])
_CONTENTS = st.lists(st.booleans(), max_size=3).map(lambda pictures: [picture() if is_picture else text("a") for is_picture in pictures])
_ITEMS = st.one_of(
    st.builds(said, _ROLES, _CONTENTS | st.just("a")),
    st.builds(output, _CONTENTS | st.just("a")),
    st.builds(call),
    st.builds(thought, st.just("t")),
)


def client_value(body: Any, path: str) -> Any:
    """What stands at a path such as `input[0].content[1]`."""
    for name in path.replace("[", ".").replace("]", "").split("."):
        body = body[int(name)] if isinstance(body, list) else body[name]
    return body


@given(items=st.lists(_ITEMS, min_size=1, max_size=8), instructions=st.none() | st.just("i"))
def test_every_picture_of_the_chat_is_found_under_its_name_in_the_request(items: list[dict[str, Any]], instructions: str | None) -> None:
    body = json.loads(json.dumps({"input": items}))
    pictures = [part for item in body["input"] for part in item.get("content") or item.get("output") or () if part in (picture(),)]
    for number, part in enumerate(pictures):
        part["image_url"] = f"{URL}?{number}"

    chat = chat_of(**body, instructions=instructions)

    found = []
    for index, message in enumerate(chat.request.messages):
        content = message.as_dict()["content"]  # type: ignore[union-attr]
        for place, part in enumerate(content if isinstance(content, list) else ()):
            if part["type"] == "image_url":
                path = chat.paths.of(f"messages[{index}].content[{place}].image_url")
                assert client_value(body, path) == part["image_url"]["url"]
                found.append(path)
    assert len(set(found)) == len(pictures)


def test_a_string_has_no_parts_to_name() -> None:
    assert chat_of(input="x").paths.of("messages[0].content") == "input"


def test_errors_and_warnings_begin_with_the_clients_name() -> None:
    paths = FieldPaths({"a": Place("b"), "w": Place("v", is_whole=True)})

    error = paths.error(bad_request("invalid_value", "a.x[0]: wrong", param="a.x[0]"))

    assert (error.param, error.message) == ("b.x[0]", "b.x[0]: wrong")
    assert paths.text("w.x: no") == "v: no"
    assert paths.text("ab: no") == "ab: no"
    assert paths.text("some words: no") == "some words: no"
    assert paths.error(bad_request("invalid_value", "words")).message == "words"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "name": "f", "parameters": {"type": "string"}}]}, "tools[0].parameters"),
        ({"tools": [{"type": "function", "name": "f"}] * 2}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ],
)
def test_what_chats_refuse_is_refused_under_the_clients_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as error:
        chat_of(input="x", **fields)

    assert (error.value.status, error.value.param) == (400, param)
    assert error.value.message.startswith(f"{param}: ")


def test_what_is_given_back_is_the_same_input_again() -> None:
    items = [
        said("user", [text("a"), picture(file_id="f")]),
        thought("t"),
        said("assistant", "b"),
        call(),
        output([picture()]),
        output("x"),
    ]

    once = [as_given_back(item) for item in ITEMS.validate_python(items)]
    twice = [as_given_back(item) for item in ITEMS.validate_python(once)]

    assert once == twice
    assert TypeAdapter(list[dict[str, Any]]).validate_python(once)
    assert len({item["id"] for item in once}) == len(once)
