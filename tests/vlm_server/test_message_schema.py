"""What the chat template gets of a message."""

from typing import Any

import pytest
from pydantic import ValidationError

from vlm_server.message_schema import ChatMessage


def calling(arguments: str) -> dict[str, Any]:
    call = {"id": "call_1", "type": "function", "index": 0, "function": {"name": "f", "arguments": arguments}}
    return ChatMessage.model_validate({"role": "assistant", "content": None, "tool_calls": [call]}).as_dict()


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ('{"city": "Hangzhou"}', {"city": "Hangzhou"}),
        ("{}", {}),
        ("", ""),
        ('{"city": ', '{"city": '),
        ("[1]", "[1]"),
        ('{"a": ' * 100 + "1" + "}" * 100, '{"a": ' * 100 + "1" + "}" * 100),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_arguments_are_the_object_that_they_write_or_their_text(text: str, seen: object) -> None:
    assert calling(text) == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": seen}}],
    }


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    answer = {"role": "assistant", "content": "42", "refusal": None, "reasoning_content": None, "tool_calls": None}

    message = ChatMessage.model_validate(answer).as_dict()

    assert message == {"role": "assistant", "content": "42", "reasoning_content": None}


def test_fields_that_no_api_documents_do_not_reach_the_template() -> None:
    assert ChatMessage.model_validate({"role": "user", "content": "hi", "odd": [1]}).as_dict() == {"role": "user", "content": "hi"}


def test_reasoning_of_an_earlier_turn_is_the_templates_to_write() -> None:
    message = {"role": "assistant", "content": "42", "reasoning_content": "Hm."}

    assert ChatMessage.model_validate(message).as_dict() == message


@pytest.mark.parametrize("content", ["Hi", [{"type": "text", "text": "Hi"}]])
def test_message_is_another_name_of_content(content: Any) -> None:
    named = ChatMessage.model_validate({"role": "user", "message": content})
    both = ChatMessage.model_validate({"role": "user", "message": content, "content": content})

    assert named.as_dict() == both.as_dict() == {"role": "user", "content": content}


def test_a_text_under_two_names_has_to_be_the_same() -> None:
    with pytest.raises(ValidationError) as caught:
        ChatMessage.model_validate({"role": "user", "message": "Hi", "content": "Ho"})

    [error] = caught.value.errors()
    assert (error["loc"], error["msg"]) == (("message",), "another name of content; give one of the two")
