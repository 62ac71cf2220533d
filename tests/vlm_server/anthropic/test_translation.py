"""Which chat a request of Anthropic's API means, and under which names its parts came."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_server.anthropic.protocol import MessagesRequest
from vlm_server.anthropic.translation import chat_fields, translate, without_effect
from vlm_server.errors import ApiError

HI = {"role": "user", "content": "Hi"}
TEXT = {"type": "text", "text": "Look:"}
PNG = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
WEB = {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}
STORED = {"type": "image", "source": {"type": "file", "file_id": "file-1"}}
PNG_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
WEB_PART = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
STORED_PART = {"type": "image_url", "image_url": {"file_id": "file-1"}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": "你好"}}
CALL_OF_CHAT = {"id": "toolu_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "你好"}'}}
THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "x"}


def result(content: Any = None, **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "toolu_1", **({} if content is None else {"content": content}), **fields}


def tool(content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "toolu_1", "content": content}


def request(*messages: Any, **fields: Any) -> MessagesRequest:
    return MessagesRequest.model_validate({"model": "m", "max_tokens": 8, "messages": list(messages), **fields})


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


MESSAGES: list[tuple[str, list[Any], list[Any]]] = [
    ("a string stays one", [HI], [HI]),
    ("one text is a string", [user(TEXT)], [{"role": "user", "content": "Look:"}]),
    ("no text is an empty string", [user()], [{"role": "user", "content": ""}]),
    ("pictures keep their places", [user(PNG, TEXT, WEB, STORED)], [{"role": "user", "content": [PNG_PART, TEXT, WEB_PART, STORED_PART]}]),
    ("neighbours are one turn", [HI, user(WEB)], [{"role": "user", "content": [{"type": "text", "text": "Hi"}, WEB_PART]}]),
    (
        "a call is a field, and thinking is another",
        [HI, assistant(THOUGHT, TEXT, CALL), user(result("42"))],
        [HI, {"role": "assistant", "content": "Look:", "reasoning_content": "Hm.", "tool_calls": [CALL_OF_CHAT]}, tool("42")],
    ),
    ("texts of the assistant are one", [HI, assistant(TEXT, TEXT), HI], [HI, {"role": "assistant", "content": "Look:Look:"}, HI]),
    ("a call may be alone", [HI, assistant(CALL)], [HI, {"role": "assistant", "content": None, "tool_calls": [CALL_OF_CHAT]}]),
    ("results are messages before the rest", [user(result("a"), result("b"), TEXT)], [tool("a"), tool("b"), {**HI, "content": "Look:"}]),
    ("a result may hold pictures", [user(result([TEXT, PNG]))], [tool([TEXT, PNG_PART])]),
    ("a result may be empty", [user(result())], [tool("")]),
    ("a failed result says so", [user(result("no", is_error=True))], [tool("Error: no")]),
    ("an empty one too", [user(result(is_error=True))], [tool("Error: ")]),
    ("and one of a picture", [user(result([PNG], is_error=True))], [tool([{"type": "text", "text": "Error: "}, PNG_PART])]),
    ("a result that did not fail is as it is", [user(result("yes", is_error=False))], [tool("yes")]),
    (
        "redacted thinking is left out",
        [HI, assistant({"type": "redacted_thinking", "data": "x"}, TEXT)],
        [HI, {**assistant(), "content": "Look:"}],
    ),
    (
        "a system message stays where it is",
        [HI, {"role": "system", "content": "Be brief."}],
        [HI, {"role": "system", "content": "Be brief."}],
    ),
]


@pytest.mark.parametrize(("given", "expected"), [row[1:] for row in MESSAGES], ids=[row[0] for row in MESSAGES])
def test_messages_become_those_of_a_chat(given: list[Any], expected: list[Any]) -> None:
    fields, _ = chat_fields(request(*given))

    assert fields["messages"] == expected


@pytest.mark.parametrize(
    "system", ["Be brief.", [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]]
)
def test_the_system_text_comes_first(system: Any) -> None:
    fields, names = chat_fields(request(HI, system=system))

    assert fields["messages"][0] == {"role": "system", "content": "Be brief."}
    assert names.of("messages[0].content").startswith("system")
    assert names.of("messages[1].content") == "messages[0].content"


SCHEMA = {"type": "object", "properties": {"at": {"type": "string"}}}
LOOK = {"name": "look", "input_schema": SCHEMA}
FUNCTION = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}

FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 0.5, "top_p": 0.5, "top_k": 3}, {"temperature": 0.5, "top_p": 0.5, "top_k": 3}),
    ({"stop_sequences": ["a", "b"]}, {"stop": ["a", "b"]}),
    ({"stop_sequences": None, "temperature": None, "system": None, "tools": None, "thinking": None}, {}),
    ({"stream": True}, {"stream": True}),
    ({"metadata": {"user_id": "u"}, "service_tier": "auto", "cache_control": {"type": "ephemeral"}}, {}),
    ({"tools": [LOOK]}, {"tools": [FUNCTION]}),
    (
        {"tools": [{**LOOK, "type": "custom", "strict": True}]},
        {"tools": [{**FUNCTION, "function": {**FUNCTION["function"], "strict": True}}]},
    ),  # type: ignore[dict-item]
    ({"tools": [LOOK], "tool_choice": {"type": "auto"}}, {"tools": [FUNCTION], "tool_choice": "auto"}),
    ({"tools": [LOOK], "tool_choice": {"type": "any"}}, {"tools": [FUNCTION], "tool_choice": "required"}),
    ({"tools": [LOOK], "tool_choice": {"type": "none"}}, {"tools": [FUNCTION], "tool_choice": "none"}),
    (
        {"tools": [LOOK], "tool_choice": {"type": "tool", "name": "look", "disable_parallel_tool_use": True}},
        {"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "look"}}, "parallel_tool_calls": False},
    ),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"enable_thinking": True}),
    ({"thinking": {"type": "adaptive"}}, {"enable_thinking": True}),
    ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
    ({"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
    (
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    ),
]


@pytest.mark.parametrize(("given", "expected"), FIELDS, ids=[",".join(given) for given, _ in FIELDS])
def test_fields_become_those_of_a_chat(given: dict[str, Any], expected: dict[str, Any]) -> None:
    fields, _ = chat_fields(request(HI, **given))

    assert fields == {"model": "m", "messages": [HI], "max_tokens": 8, **expected}


def test_a_last_message_of_the_assistant_is_to_be_continued() -> None:
    translation = translate(request(HI, assistant(TEXT, {"type": "text", "text": " a"})))

    assert translation.chat.continued_text() == "Look: a"
    assert not translation.chat.adds_generation_prompt


REFUSED_BY_THE_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": [LOOK], "tool_choice": {"type": "tool", "name": "sing"}}, "tool_choice"),
    ({"tools": [LOOK], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tools": [LOOK, LOOK]}, "tools"),
    ({"tools": [LOOK, {"name": "sing", "input_schema": {"type": "string"}}]}, "tools[1].input_schema"),
    ({"messages": [HI, assistant(CALL)]}, "messages[1].content"),
    ({"messages": [HI, assistant({**CALL, "input": {"at": "\ud800"}}), user(result("x"))]}, "messages[1].content[0].input"),
    ({"messages": [HI, assistant({"type": "text", "text": ""})]}, "messages[1].content"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED_BY_THE_CHAT)
def test_what_no_chat_can_have_is_refused_under_the_clients_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        translate(request(**{"model": "m", **fields}) if "messages" in fields else request(HI, **fields))

    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.message.startswith(f"{param}: ")


def test_what_has_no_effect_is_said() -> None:
    given = request(
        HI, assistant(TEXT, {"type": "redacted_thinking", "data": "x"}), HI, thinking={"type": "enabled", "budget_tokens": 2000}
    )

    assert [warning.partition(":")[0] for warning in without_effect(given)] == ["messages[1].content[1]", "thinking.budget_tokens"]


texts = st.builds(lambda text: {"type": "text", "text": text}, st.text("ab", min_size=1, max_size=3))
images = st.builds(
    lambda name: {"type": "image", "source": {"type": "url", "url": f"https://{name}"}}, st.text("ab", min_size=1, max_size=3)
)
results = st.builds(
    result, st.one_of(st.none(), st.text("ab", max_size=3), st.lists(st.one_of(texts, images), max_size=2)), is_error=st.booleans()
)
user_messages = st.builds(user, st.one_of(texts, images, results), st.one_of(texts, images, results))
assistant_messages = st.builds(assistant, st.one_of(texts, st.just(THOUGHT)), st.one_of(texts, st.just(CALL)))
conversations = st.lists(st.one_of(user_messages, assistant_messages, st.just(HI)), min_size=1, max_size=5)


def value_at(body: Any, path: str) -> Any:
    for step in re.findall(r"[^.\[\]]+", path):
        body = body[int(step) if isinstance(body, list) else step]
    return body


@given(conversations, st.sampled_from([None, "Be brief.", [{"type": "text", "text": "Be"}, {"type": "text", "text": " brief."}]]))
def test_every_part_of_the_chat_has_the_name_of_what_the_client_wrote(messages: list[Any], system: Any) -> None:
    body = {"system": system, "messages": messages}
    fields, names = chat_fields(request(*messages, system=system))

    for number, message in enumerate(fields["messages"]):
        here = f"messages[{number}]"
        parts = message["content"] if isinstance(message["content"], list) else []
        for index, part in enumerate(parts):
            if part["type"] == "image_url":
                assert value_at(body, names.of(f"{here}.content[{index}].image_url.url")) == part["image_url"]["url"]
            elif not part["text"].startswith("Error: "):
                block = value_at(body, names.of(f"{here}.content[{index}]"))
                assert part["text"] == (block if isinstance(block, str) else block["text"])
        for index, call in enumerate(message.get("tool_calls", ())):
            written = value_at(body, names.of(f"{here}.tool_calls[{index}].function.arguments"))
            assert written == json.loads(call["function"]["arguments"])
        if message["role"] == "tool":
            assert value_at(body, names.of(f"{here}.tool_call_id")) == message["tool_call_id"]


@given(conversations)
def test_nothing_that_the_client_wrote_is_lost_or_reordered(messages: list[Any]) -> None:
    fields, _ = chat_fields(request(*messages))

    assert written_in(fields["messages"]) == written_in(messages)


def written_in(value: Any) -> str:
    """All texts and addresses, in order; of an assistant's turns texts, thoughts and calls each for themselves."""
    found: list[str] = []  # one string: texts of the assistant are put together

    def walk(value: Any) -> None:
        if isinstance(value, list):
            for item in value:
                walk(item)
        elif isinstance(value, dict):
            for name in ("content", "text", "url", "image_url", "source"):
                walk(value.get(name))
        elif isinstance(value, str):
            found.append(value.removeprefix("Error: "))

    walk(value)
    return "".join(found)
