"""Chats with tools and reasoning over HTTP: what answers look like, whole and streamed, and how they end."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests.contract.running import RunningServer, fake_config, running_server
from tests.vlm_server.byte_tokenizer import EOS
from tests.vlm_server.test_fields import sampled_with
from tests.vlm_server.test_guided import accepts
from vlm_server.examples import RED_CIRCLE

ASK = [{"role": "user", "content": "How is the weather?"}]
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
TOOLS = [WEATHER, LOOK]
ARGUMENTS = '{"city": "杭州", "days": [1, 2]}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def thinking_server() -> Iterator[RunningServer]:
    with running_server(fake_config(reasoning_parser="qwen3")) as server:
        yield server


@pytest.fixture
def thinker(thinking_server: RunningServer) -> RunningServer:
    """A server whose model reasons before it answers."""
    thinking_server.backend.reset()
    return thinking_server


def post(server: RunningServer, text: str = CALL, **fields: Any) -> requests.Response:
    """The answer to a chat with tools, for which the model writes `text`."""
    server.backend.engine.script = lambda prompt, params: [*text.encode(), EOS]
    body = {"model": server.model, "messages": ASK, "tools": TOOLS, **fields}
    return requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=10)


def choice(server: RunningServer, text: str = CALL, **fields: Any) -> dict[str, Any]:
    response = post(server, text, **fields)
    assert response.status_code == 200, response.text
    return dict(response.json()["choices"][0])


def chunks(server: RunningServer, text: str = CALL, **fields: Any) -> list[dict[str, Any]]:
    lines = post(server, text, stream=True, **fields).text.splitlines()
    return [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]


def put_together(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of the chunks of one answer."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for delta in (chunk["delta"] for chunk in chunks):
        message["content"] += delta["content"] or ""
        message["reasoning_content"] += delta.get("reasoning_content") or ""
        for piece in delta.get("tool_calls", ()):
            if piece["index"] == len(message["tool_calls"]):
                message["tool_calls"].append({**piece, "function": dict(piece["function"])})
            else:
                assert set(piece) == {"index", "function"}
                message["tool_calls"][piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    return message


def functions(message: dict[str, Any]) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"] or ()]


def test_a_call_is_a_message_without_content(server: RunningServer) -> None:
    answer = choice(server)

    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] is None
    [call] = answer["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    assert call["type"] == "function"
    assert call["function"] == {"name": "get_weather", "arguments": ARGUMENTS}


def test_the_tools_are_in_the_prompt(server: RunningServer) -> None:
    post(server)

    assert b'"name": "get_weather"' in bytes(server.backend.engine.requests[-1][0].token_ids[1:])


def test_several_calls_behind_content_have_ids_of_their_own(server: RunningServer) -> None:
    message = choice(server, f"Let me see.\n{CALL}\n{SECOND}")["message"]

    assert message["content"] == "Let me see."
    assert functions(message) == [("get_weather", ARGUMENTS), ("look", "{}")]
    assert len({call["id"] for call in message["tool_calls"]}) == 2


@pytest.mark.parametrize("group", [1, 2, 5, 64])
@pytest.mark.parametrize(
    "text", [CALL, f"Let me see.\n{CALL}\n{SECOND}", f"{CALL}\nThat is it.", "No call.", "<tool_call>no</tool_call>", ""]
)
def test_a_stream_is_the_whole_answer_in_pieces(server: RunningServer, text: str, group: int) -> None:
    whole = choice(server, text)
    server.backend.engine.group = group

    streamed = chunks(server, text)

    message = put_together(streamed)
    assert message["content"] == (whole["message"]["content"] or "")
    assert functions(message) == functions(whole["message"])
    assert [chunk["finish_reason"] for chunk in streamed if chunk["finish_reason"]] == [whole["finish_reason"]]
    assert streamed[-1]["finish_reason"]
    assert "<tool_call" not in message["content"] or text.startswith("<tool_call>no")


def test_a_streamed_call_begins_with_its_name_and_goes_on_with_its_arguments(server: RunningServer) -> None:
    streamed = chunks(server)

    calls = [piece for chunk in streamed for piece in chunk["delta"].get("tool_calls", ())]
    assert {"index", "id", "type", "function"} == set(calls[0])
    assert calls[0]["function"] == {"name": "get_weather", "arguments": ""}
    assert len(calls) > len(ARGUMENTS) / 2
    assert streamed[0]["delta"] == {"role": "assistant", "content": None}
    assert streamed[-1]["delta"] == {"content": None}


def test_no_tool_is_called_that_may_not_be(server: RunningServer) -> None:
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "look"}}]}}

    answer = choice(server, tool_choice=allowed)

    assert answer["finish_reason"] == "stop"
    assert answer["message"]["content"] == CALL
    assert b"get_weather" not in bytes(server.backend.engine.requests[-1][0].token_ids[1:])
    assert functions(choice(server, SECOND, tool_choice=allowed)["message"]) == [("look", "{}")]


def test_without_a_choice_of_tools_there_are_none(server: RunningServer) -> None:
    answer = choice(server, tool_choice="none")

    assert (answer["message"]["content"], answer["message"]["tool_calls"], answer["finish_reason"]) == (CALL, None, "stop")
    assert b"get_weather" not in bytes(server.backend.engine.requests[-1][0].token_ids[1:])


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_alone_ends_the_engines_work(server: RunningServer, stream: bool) -> None:
    server.backend.engine.hangs_after = len(CALL.encode()) - len("\n</tool_call>") - 1  # with the arguments' last bracket

    answer = (
        chunks(server, CALL + SECOND, parallel_tool_calls=False) if stream else [choice(server, CALL + SECOND, parallel_tool_calls=False)]
    )

    message = put_together(answer) if stream else answer[0]["message"]
    assert functions(message) == [("get_weather", ARGUMENTS)]
    assert answer[-1]["finish_reason"] == "tool_calls"
    assert server.backend.activity.was_left_within(1)


def test_tokens_behind_the_only_call_are_not_charged(server: RunningServer) -> None:
    server.backend.engine.group = 1000

    usage = post(server, CALL + SECOND, parallel_tool_calls=False).json()["usage"]

    assert usage["completion_tokens"] == len(CALL.encode()) - len("}\n</tool_call>")


@pytest.mark.parametrize(("max_tokens", "content", "calls"), [(20, '<tool_call>\n{"name":', []), (55, None, [("get_weather", '{"city')])])
def test_an_answer_that_ends_by_length_in_a_call(
    server: RunningServer, max_tokens: int, content: str | None, calls: list[tuple[str, str]]
) -> None:
    answer = choice(server, max_tokens=max_tokens)

    assert answer["finish_reason"] == "length"
    assert answer["message"]["content"] == content
    assert functions(answer["message"]) == calls
    assert put_together(chunks(server, max_tokens=max_tokens))["content"] == (content or "")


def test_a_stop_string_in_the_arguments_leaves_an_unfinished_call(server: RunningServer) -> None:
    answer = choice(server, stop=["days"])

    assert functions(answer["message"]) == [("get_weather", '{"city": "杭州", "')]
    assert answer["finish_reason"] == "stop"


def test_a_stop_string_behind_a_call_leaves_the_call(server: RunningServer) -> None:
    answer = choice(server, f"{CALL}\nOBSERVATION: x", stop=["OBSERVATION"])

    assert functions(answer["message"]) == [("get_weather", ARGUMENTS)]
    assert (answer["finish_reason"], answer["message"]["content"]) == ("tool_calls", None)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_every_token(server: RunningServer, stream: bool) -> None:
    answers = chunks(server, logprobs=True) if stream else [choice(server, logprobs=True)]

    tokens = [token for answer in answers if answer["logprobs"] for token in answer["logprobs"]["content"]]
    assert b"".join(bytes(token["bytes"]) for token in tokens) == CALL.encode()


def test_every_choice_has_its_own_calls(server: RunningServer) -> None:
    choices = post(server, n=3).json()["choices"]
    streamed = chunks(server, n=3)

    assert [functions(choice["message"]) for choice in choices] == [[("get_weather", ARGUMENTS)]] * 3
    for index in range(3):
        assert functions(put_together([chunk for chunk in streamed if chunk["index"] == index])) == [("get_weather", ARGUMENTS)]
    ids = [piece["id"] for chunk in streamed for piece in chunk["delta"].get("tool_calls", ()) if "id" in piece]
    assert len(set(ids)) == 3


def test_results_of_tools_reach_the_model_with_their_pictures(server: RunningServer) -> None:
    called = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
    result = [{"type": "text", "text": "It looks so:"}, {"type": "image_url", "image_url": {"url": RED_CIRCLE}}]
    turns = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": result},
    ]

    response = post(server, "Blue.", messages=turns)

    assert response.json()["choices"][0]["message"]["content"] == "Blue."
    assert response.json()["usage"]["prompt_tokens_details"]["image_tokens"] > 0
    prompt = bytes(token_id for token_id in server.backend.engine.requests[-1][0].token_ids if token_id < 256)
    assert b'"arguments": {"at": "sky"}' in prompt
    assert b"tool: It looks so:" in prompt


NAMED = {"type": "function", "function": {"name": "look"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}


@pytest.mark.parametrize(
    ("forced", "right", "wrong"),
    [
        ("required", (CALL, SECOND, f"{CALL}\n{SECOND}"), ("hello", f"hello {CALL}", CALL + "hello")),
        (NAMED, (SECOND,), (CALL, f"{SECOND}\n{SECOND}")),
        (ALLOWED, (SECOND, f"{SECOND}\n{SECOND}"), (CALL,)),
    ],
    ids=["required", "named", "allowed"],
)
def test_a_forced_call_is_all_that_the_grammar_leaves(server: RunningServer, forced: Any, right: Any, wrong: Any) -> None:
    assert post(server, tool_choice=forced).status_code == 200

    grammar = sampled_with(server).grammar
    assert [text for text in right if not accepts(grammar, text)] == []
    assert [text for text in wrong if accepts(grammar, text)] == []


def test_a_strict_tool_is_called_by_its_schema_or_not_at_all(server: RunningServer) -> None:
    strict = {"name": "look", "strict": True, "parameters": {"type": "object", "properties": {"at": {"enum": ["sky"]}}, "required": ["at"]}}
    assert post(server, tools=[WEATHER, {"type": "function", "function": strict}]).status_code == 200

    grammar = sampled_with(server).grammar
    right = ("hello", CALL, 'Let me see. <tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call> So.')
    assert [text for text in right if not accepts(grammar, text)] == []
    assert not accepts(grammar, SECOND)
    assert not accepts(grammar, '<tool_call>\n{"name": "look", "arguments": {"at": "sea"}}\n</tool_call>')
    assert post(server, tools=[LOOK]).status_code == 200
    assert sampled_with(server).grammar is None


def test_a_fixed_form_leaves_calls_as_the_only_other_answer(server: RunningServer) -> None:
    assert post(server, response_format={"type": "regex_schema", "regex_schema": "yes|no"}).status_code == 200

    grammar = sampled_with(server).grammar
    assert all(accepts(grammar, text) for text in ("yes", "no", CALL, f"{CALL}\n{SECOND}"))
    assert not any(accepts(grammar, text) for text in ("maybe", f"yes {CALL}", ""))


@pytest.mark.parametrize("fields", [{"tool_choice": "required"}, {"response_format": {"type": "json_object"}, "tools": None}], ids=str)
def test_a_model_may_reason_before_what_is_fixed(thinker: RunningServer, fields: dict[str, Any]) -> None:
    fixed = CALL if "tool_choice" in fields else '{"a": 1}'
    assert post(thinker, **fields).status_code == 200

    grammar = sampled_with(thinker).grammar
    assert all(accepts(grammar, text) for text in (fixed, f"<think>\nWell {{.\n</think>\n\n{fixed}"))
    assert not any(accepts(grammar, text) for text in ("Well", "<think>Well</think>", f"Well {fixed}"))


@pytest.mark.parametrize("fields", [{"tool_choice": "required", "ignore_eos": True}], ids=str)
def test_what_a_forced_call_cannot_be_with_is_refused(server: RunningServer, fields: dict[str, Any]) -> None:
    response = post(server, **fields)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "ignore_eos"


def test_parameters_that_no_grammar_can_follow_are_refused(server: RunningServer) -> None:
    odd = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}}

    response = post(server, tools=[odd], tool_choice="required")

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"
    assert not server.backend.engine.requests


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_tools_need_a_parser_and_a_template_that_writes_them(path: str) -> None:
    with running_server(fake_config(tool_call_parser="none")) as server:
        body = {"model": server.model, "messages": ASK, "tools": TOOLS}
        response = requests.post(f"{server.url}{path}", json=body, timeout=10)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "tools"
        assert "--tool-call-parser" in response.json()["error"]["message"]
        if path != "/tokenize":
            assert post(server, tool_choice="none").status_code == 200


def test_a_message_is_continued(server: RunningServer) -> None:
    begun = [*ASK, {"role": "assistant", "content": "Once"}]

    answer = choice(server, " upon a time", messages=begun, continue_final_message=True)

    assert answer["message"]["content"] == " upon a time"
    assert bytes(server.backend.engine.requests[-1][0].token_ids[-4:]) == b"Once"


def test_the_beginning_of_the_answer_can_be_left_out(server: RunningServer) -> None:
    choice(server, "x", add_generation_prompt=False)

    assert bytes(server.backend.engine.requests[-1][0].token_ids[-9:]) == b"weather?\n"


# --- Reasoning ------------------------------------------------------------------------------------------------------------------------

THOUGHT = "<think>\nHm, 天气.\n</think>\n\n"


@pytest.mark.parametrize("group", [1, 3, 64])
@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        (THOUGHT + "Sunny.", "Hm, 天气.", "Sunny.", []),
        (THOUGHT + CALL, "Hm, 天气.", None, [("get_weather", ARGUMENTS)]),
        ("Sunny.", None, "Sunny.", []),
        ("<think>Hm", "Hm", None, []),
        ("", None, "", []),
    ],
)
def test_reasoning_is_no_content(
    thinker: RunningServer, text: str, reasoning: str | None, content: str | None, calls: list[tuple[str, str]], group: int
) -> None:
    thinker.backend.engine.group = group

    message = choice(thinker, text)["message"]
    streamed = put_together(chunks(thinker, text))

    assert (message["reasoning_content"], message["content"], functions(message)) == (reasoning, content, calls)
    assert (streamed["reasoning_content"], streamed["content"], functions(streamed)) == (reasoning or "", content or "", calls)


@pytest.mark.parametrize(
    ("prompt_end", "reasoning"), [("assistant: <think>\n", "Hm."), ("assistant: <think>\n\n</think>\n\n", None), ("assistant: ", None)]
)
def test_a_prompt_that_opens_the_reasoning_is_seen(thinker: RunningServer, prompt_end: str, reasoning: str | None) -> None:
    thinker.backend.pipeline.template.generation_prompt = prompt_end

    message = choice(thinker, "Hm.\n</think>\n\nSunny.")["message"]

    assert message["reasoning_content"] == reasoning
    assert message["content"] == ("Sunny." if reasoning else "Hm.\n</think>\n\nSunny.")


def test_a_users_marker_opens_no_reasoning(thinker: RunningServer) -> None:
    thinker.backend.pipeline.template.generation_prompt = ""

    assert choice(thinker, "Sunny.", messages=[{"role": "user", "content": "What is <think> for?"}])["message"]["content"] == "Sunny."


def test_reasoning_that_was_begun_is_continued(thinker: RunningServer) -> None:
    begun = [*ASK, {"role": "assistant", "content": "<think>\nLet me see,"}]

    message = choice(thinker, " it is.</think>Sunny.", messages=begun, continue_final_message=True)["message"]

    assert (message["reasoning_content"], message["content"]) == (" it is.", "Sunny.")


@pytest.mark.parametrize("group", [1, 3, 64])
def test_tokens_of_the_reasoning_are_counted(thinker: RunningServer, group: int) -> None:
    thinker.backend.engine.group = group
    usage = post(thinker, THOUGHT + "Sunny.").json()["usage"]
    twice = post(thinker, THOUGHT + "Sunny.", n=2).json()["usage"]

    num_between = len("\nHm, 天气.\n".encode())
    assert usage["completion_tokens_details"]["reasoning_tokens"] == num_between
    assert twice["completion_tokens_details"]["reasoning_tokens"] == 2 * num_between
    assert usage["completion_tokens"] == len((THOUGHT + "Sunny.").encode()) + 1


def test_answers_without_reasoning_count_none(thinker: RunningServer, server: RunningServer) -> None:
    assert post(thinker, "Sunny.").json()["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
    assert post(server, "Sunny.").json()["usage"]["completion_tokens_details"] is None


def test_without_a_parser_reasoning_is_content() -> None:
    with running_server(fake_config(reasoning_parser="none")) as server:
        assert choice(server, THOUGHT + "Sunny.", tools=None)["message"]["content"] == THOUGHT + "Sunny."
