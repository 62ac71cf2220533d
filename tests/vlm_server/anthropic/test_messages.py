"""`/v1/messages` over HTTP: what is refused, under which name, and that every error has Anthropic's body."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from engine.request import EngineDeadError, QueueFullError
from tests.contract.fake_engine import DEFAULT_REPLY
from tests.contract.running import MODEL, RunningServer, fake_config, running_server
from vlm_server.anthropic.response_schema import AnthropicErrorResponse, MessageResponse, ModelInfo, ModelInfoList, TokenCount

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
VERSION = {"anthropic-version": "2023-06-01"}
HI = {"role": "user", "content": "Hi"}
LOOK = {"name": "look", "input_schema": {"type": "object"}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}


def post(server: RunningServer, path: str = MESSAGES, *, headers: dict[str, str] = VERSION, **fields: Any) -> requests.Response:
    body = {"model": MODEL, "messages": [HI], **({"max_tokens": 99} if path.endswith(MESSAGES) else {}), **fields}
    return requests.post(server.url + path, json=body, headers=headers, timeout=10)


def image(**source: Any) -> list[Any]:
    return [{"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image", "source": source}]}]


def blocks(*blocks: Any, role: str = "user") -> list[Any]:
    return [HI, {"role": role, "content": list(blocks)}]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"temperature": 2.5}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"stop_sequences": ["a", ""]}, "stop_sequences[1]"),
    ({"service_tier": "fast"}, "service_tier"),
    ({"system": [{"type": "image"}]}, "system[0]"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": blocks({"type": "document", "source": {}})}, "messages[1].content[0]"),
    ({"messages": blocks({"type": "search_result"})}, "messages[1].content[0]"),
    ({"messages": blocks({"type": "web_search_tool_result"}, role="assistant")}, "messages[1].content[0]"),
    ({"messages": blocks({"type": "server_tool_use"}, role="assistant")}, "messages[1].content[0]"),
    ({"messages": blocks({"type": "dance"})}, "messages[1].content[0]"),
    ({"messages": blocks("x")}, "messages[1].content[0]"),
    ({"messages": blocks(CALL)}, "messages[1].content[0]"),
    ({"messages": blocks({"type": "image"}, role="assistant")}, "messages[1].content[0]"),
    ({"messages": blocks({**CALL, "input": "x"}, role="assistant")}, "messages[1].content[0].input"),
    ({"messages": blocks({"type": "tool_result"})}, "messages[1].content[0].tool_use_id"),
    (
        {"messages": blocks({"type": "tool_result", "tool_use_id": "x", "content": [{"type": "document"}]})},
        "messages[1].content[0].content[0]",
    ),
    ({"messages": blocks({"type": "text", "text": "x", "citations": [{}]})}, "messages[1].content[0].citations"),
    (
        {"messages": blocks({"type": "text", "text": "x", "cache_control": {"type": "eternal"}})},
        "messages[1].content[0].cache_control.type",
    ),
    ({"messages": image(type="url")}, "messages[0].content[1].source.url"),
    ({"messages": image(type="ftp")}, "messages[0].content[1].source"),
    ({"messages": image(type="base64", data="AAAA", media_type="text/html")}, "messages[0].content[1].source.media_type"),
    ({"messages": image(type="url", url="https://example.org/bad.png")}, "messages[0].content[1].source.url"),
    ({"messages": image(type="base64", data="bad", media_type="image/png")}, "messages[0].content[1].source.data"),
    ({"messages": image(type="url", url="half \ud800")}, "messages[0].content[1].source.url"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
    ({"tools": [{"name": "look"}]}, "tools[0].input_schema"),
    ({"tools": [{**LOOK, "name": "two words"}]}, "tools[0].name"),
    ({"tools": [{**LOOK, "defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tools": [{**LOOK, "input_schema": {"type": "array"}}]}, "tools[0].input_schema"),
    ({"tools": [LOOK], "tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"tools": [LOOK], "tool_choice": {"type": "auto", "name": "look"}}, "tool_choice.name"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type"),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "strange"}}}}, "output_config.format.schema"),
    ({"container": "c_1"}, "container"),
    ({"mcp_servers": [{}]}, "mcp_servers"),
    ({"speed": "fast"}, "speed"),
    ({"thread": {"type": "create"}}, "thread"),
    ({"output_format": {"type": "json_schema"}}, "output_format"),
    ({"diagnostics": {"previous_message_id": "msg_1"}}, "diagnostics"),
    ({"return_logprob": True}, "return_logprob"),
    ({"input_ids": [1]}, "input_ids"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[f"{param}-{number}" for number, (_, param) in enumerate(REFUSED)])
def test_what_is_refused_is_named_as_the_client_wrote_it(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    response = post(server, **fields)

    assert response.status_code == 400, response.text
    error = AnthropicErrorResponse.model_validate(response.json()).error
    assert (error.type, error.details.param) == ("invalid_request_error", param)
    assert error.message.startswith(f"{param}: ")
    assert server.backend.engine.requests == []


@pytest.mark.parametrize("kind", ["document", "server_tool_use", "web_search_20250305"])
def test_what_only_anthropics_servers_can_do_is_refused_by_its_name(server: RunningServer, kind: str) -> None:
    fields = {"tools": [{"type": kind, "name": "x"}]} if kind.startswith("web") else {"messages": blocks({"type": kind})}

    assert kind in post(server, **fields).json()["error"]["message"]


ACCEPTED: list[dict[str, Any]] = [
    {"metadata": {"user_id": "u"}, "service_tier": "standard_only", "cache_control": {"type": "ephemeral"}},
    {"container": None, "speed": "standard", "mcp_servers": [], "diagnostics": {"previous_message_id": None}},
    {"return_logprob": False, "include_stop_str_in_output": False, "input_ids": None},
    {"messages": blocks({"type": "text", "text": "x", "citations": None, "cache_control": None})},
    {"messages": [HI, {"role": "assistant", "content": [{**CALL, "caller": {"type": "direct"}}]}, HI], "tools": [LOOK]},
    {"tools": [{**LOOK, "type": "custom", "allowed_callers": ["direct"], "defer_loading": False, "input_examples": []}]},
    {"system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "5m"}}]},
]


@pytest.mark.parametrize("fields", ACCEPTED)
def test_documented_fields_that_ask_for_nothing_are_accepted_without_a_word(server: RunningServer, fields: dict[str, Any]) -> None:
    response = post(server, **fields)

    assert response.status_code == 200, response.text
    assert "warnings" not in response.json()


def test_what_has_no_effect_is_said_in_the_answer(server: RunningServer) -> None:
    fields: dict[str, Any] = {"thinking": {"type": "enabled", "budget_tokens": 1024, "sound": 1}, "dance": True}
    paths = ["dance", "thinking.sound", "thinking.budget_tokens", "thinking"]  # the scripted template has no such variable

    whole = post(server, **fields).json()["warnings"]

    assert [warning.partition(": ")[0] for warning in whole] == paths
    assert [warning.partition(": ")[0] for warning in events(post(server, stream=True, **fields))[0][1]["message"]["warnings"]] == paths


def events(response: requests.Response) -> list[tuple[str, Any]]:
    lines = response.content.decode().split("\n")
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    return list(zip(names, [json.loads(line[6:]) for line in lines if line.startswith("data: ")], strict=True))


def test_events_are_named_by_their_type_and_nothing_follows_the_last(server: RunningServer) -> None:
    response = post(server, stream=True)

    assert all(name == event["type"] for name, event in events(response))
    assert events(response)[-1][1] == {"type": "message_stop"}
    assert response.text.endswith('data: {"type":"message_stop"}\n\n')
    text = "".join(event["delta"]["text"] for name, event in events(response) if name == "content_block_delta")
    assert text == DEFAULT_REPLY
    assert response.headers["request-id"] == response.headers["x-request-id"]


@pytest.mark.parametrize("path", [MESSAGES, COUNT, "/anthropic" + MESSAGES, "/anthropic" + COUNT])
def test_the_version_header_is_required(server: RunningServer, path: str) -> None:
    response = post(server, path, headers={})

    assert response.status_code == 400
    assert AnthropicErrorResponse.model_validate(response.json()).error.details.param == "anthropic-version"


@pytest.fixture(scope="module")
def guarded_server() -> Iterator[RunningServer]:
    with running_server(fake_config(api_keys=("secret",), max_body_bytes=2000, strict_fields=True)) as server:
        yield server


KEY = {**VERSION, "x-api-key": "secret"}


@pytest.mark.parametrize("headers", [KEY, {**VERSION, "authorization": "Bearer secret"}, {**KEY, "authorization": "Basic x"}])
def test_a_key_may_come_in_either_header(guarded_server: RunningServer, headers: dict[str, str]) -> None:
    assert post(guarded_server, headers=headers).status_code == 200


@pytest.mark.parametrize("headers", [VERSION, {**VERSION, "x-api-key": "wrong"}, {**VERSION, "x-api-key": ""}])
def test_without_a_right_key_there_is_no_answer(guarded_server: RunningServer, headers: dict[str, str]) -> None:
    response = post(guarded_server, headers=headers)

    assert (response.status_code, error_type(response)) == (401, "authentication_error")


def test_either_header_is_the_same_tenant(guarded_server: RunningServer) -> None:
    guarded_server.backend.reset()

    post(guarded_server, headers=KEY)
    post(guarded_server, headers={**VERSION, "authorization": "Bearer secret"})

    [(first, _), (second, _)] = guarded_server.backend.engine.requests
    assert first.cache_keys == second.cache_keys


def error_type(response: requests.Response) -> str:
    body = AnthropicErrorResponse.model_validate(response.json())
    assert body.request_id == response.headers["request-id"]
    return body.error.type


def test_errors_of_the_middleware_and_the_router_have_anthropics_body(guarded_server: RunningServer) -> None:
    url, call = guarded_server.url, {"headers": KEY, "timeout": 10}
    too_long = b"x" * 3000

    answers = {
        "413": requests.post(url + MESSAGES, data=too_long, **call),  # type: ignore[arg-type]
        "413 in pieces": requests.post(url + MESSAGES, data=iter([too_long]), **call),  # type: ignore[arg-type]
        "404": requests.get(url + "/v1/messages/batches", **call),  # type: ignore[arg-type]
        "404 below": requests.get(url + "/anthropic/v1/nope", **call),  # type: ignore[arg-type]
        "404 of a model": requests.get(url + "/v1/models/nope", **call),  # type: ignore[arg-type]
        "405": requests.get(url + MESSAGES, **call),  # type: ignore[arg-type]
        "400 of no JSON": requests.post(url + MESSAGES, data="{", **{**call, "headers": {**KEY, "content-type": "application/json"}}),  # type: ignore[arg-type]
        "400 of a strange field": post(guarded_server, headers=KEY, dance=True),
    }

    for name, response in answers.items():
        assert response.status_code == int(name[:3]), name
        kind = {"413": "request_too_large", "404": "not_found_error"}.get(name[:3], "invalid_request_error")
        assert error_type(response) == kind, name


@pytest.mark.parametrize(
    ("refusal", "status", "kind"),
    [
        (QueueFullError("full"), 429, "rate_limit_error"),
        (EngineDeadError("dead"), 503, "overloaded_error"),
        (RuntimeError("a secret"), 500, "api_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_engine_have_anthropics_body(server: RunningServer, refusal: Any, status: int, kind: str, stream: bool) -> None:
    server.backend.engine.refusal = refusal

    response = post(server, stream=stream)

    assert (response.status_code, error_type(response)) == (status, kind)
    assert "secret" not in response.text


def test_other_routes_keep_openais_errors(server: RunningServer) -> None:
    assert requests.get(f"{server.url}/v1/nope", timeout=10).json()["object"] == "error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_generation(server: RunningServer, stream: bool) -> None:
    server.backend.engine.hangs_after = 0
    data = json.dumps({"model": MODEL, "messages": [HI], "max_tokens": 99, "stream": stream}).encode()
    host, port = server.url.removeprefix("http://").split(":")

    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST {MESSAGES} HTTP/1.1\r\nHost: x\r\nanthropic-version: x\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        assert server.backend.activity.has_begun_within(5)

    assert server.backend.activity.was_left_within(5)


def test_counting_generates_nothing(server: RunningServer) -> None:
    counted = TokenCount.model_validate(post(server, COUNT, messages=image(type="url", url="https://example.org/a.png")).json())

    assert server.backend.engine.requests == []
    usage = MessageResponse.model_validate(post(server, messages=image(type="url", url="https://example.org/a.png")).json()).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_counting_names_the_clients_fields_too(server: RunningServer) -> None:
    response = post(server, COUNT, messages=image(type="url", url="https://example.org/bad.png"))

    assert (response.status_code, response.json()["error"]["details"]["param"]) == (400, "messages[0].content[1].source.url")


@pytest.mark.parametrize(("path", "headers"), [("/anthropic/v1/models", {}), ("/v1/models", VERSION)])
def test_models_have_anthropics_shape_where_its_clients_ask(server: RunningServer, path: str, headers: dict[str, str]) -> None:
    page = ModelInfoList.model_validate(requests.get(server.url + path, headers=headers, timeout=10).json())
    model = ModelInfo.model_validate(requests.get(f"{server.url}{path}/{MODEL}", headers=headers, timeout=10).json())

    assert page.data == [model]
    assert (page.first_id, page.last_id, page.has_more) == (MODEL, MODEL, False)


def test_the_document_has_the_routes_with_working_examples(server: RunningServer) -> None:
    document = requests.get(f"{server.url}/openapi.json", timeout=10).json()

    assert "/anthropic/v1/messages" not in document["paths"]
    for path in (MESSAGES, COUNT):
        operation = document["paths"][path]["post"]
        assert operation["responses"]["400"]["content"]["application/json"]["schema"]["$ref"].endswith("AnthropicErrorResponse")
        [header] = operation["parameters"]
        assert (header["name"], header["required"]) == ("anthropic-version", True)
        assert header["examples"] == {"version": {"value": VERSION["anthropic-version"]}}
        assert "example" not in header
        for sample in operation["requestBody"]["content"]["application/json"]["examples"].values():
            assert requests.post(server.url + path, json=sample["value"], headers=VERSION, timeout=10).status_code == 200
    assert "text/event-stream" in document["paths"][MESSAGES]["post"]["responses"]["200"]["content"]
