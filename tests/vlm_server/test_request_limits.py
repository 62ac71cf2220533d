"""What one request may hold and ask for: on every route, one over each limit is a 400 that names the field, the limit and its flag."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests.contract.running import RunningServer, fake_config, running_server
from vlm_server.app import create_app
from vlm_server.backend import MAX_TEMPLATE_CHARACTERS, render_limits
from vlm_server.config import ALPACA, MAX_SCHEMA_CHARACTERS, RequestLimits
from vlm_server.docs import openapi_schema
from vlm_server.request_limits import MAX_STOP_TOKEN_IDS_OF_BEAMS

LIMITS = RequestLimits(
    max_pictures=2,
    max_messages=3,
    max_choices=2,
    max_answers=4,
    max_stop_strings=2,
    max_stop_characters=10,
    max_schema_characters=200,
    max_json_depth=20,
    max_json_values=500,
    max_json_containers=100,
    max_prompt_characters=400,  # more than the template of Alpaca
)
PICTURE = "data:image/png;base64,AAAA"
PART = {"type": "image_url", "image_url": {"url": PICTURE}}
ITEM = {"type": "input_image", "image_url": PICTURE}
BLOCK = {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}
TEXT = "x" * 401
LARGE = {"type": "object", "properties": {f"name{number}": {"type": "string"} for number in range(10)}}
TOOL = {"type": "function", "function": {"name": "f", "description": "x" * 200}}

CHAT, COMPLETIONS, GENERATE, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/generate", "/v1/embeddings"
RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
INTERACTIVE, TOKENIZE, ENCODE, PERPLEXITY = "/v1/chat/interactive", "/tokenize", "/v1/encode", "/get_ppl"
DETOKENIZE, POOLING, ABORT = "/detokenize", "/pooling", "/abort_request"

SMALL: dict[str, dict[str, Any]] = {  # a request that each route takes, without its model
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS: {"prompt": "hi"},
    GENERATE: {"prompt": "hi"},
    EMBEDDINGS: {"input": "hi"},
    RESPONSES: {"input": "hi"},
    MESSAGES: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8},
    COUNT: {"messages": [{"role": "user", "content": "hi"}]},
    INTERACTIVE: {"prompt": "hi"},
    TOKENIZE: {"messages": [{"role": "user", "content": "hi"}]},
    ENCODE: {"input": "hi"},
    PERPLEXITY: {"input": "hi"},
    DETOKENIZE: {"tokens": [65]},
    POOLING: {"input": "hi"},
    ABORT: {"abort_all": True},
}
REFUSED_ANYWAY = {POOLING: "unsupported_model", ABORT: "not_enabled"}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


# Limit → (route, one over it, the field that is named).
OVER: dict[str, list[tuple[str, dict[str, Any], str]]] = {
    "max-pictures": [
        (CHAT, {"messages": [user(PART), user(PART, PART)]}, "messages[1].content[1].image_url"),
        (TOKENIZE, {"messages": [user(PART, PART, PART)]}, "messages[0].content[2].image_url"),
        (GENERATE, {"image_data": [PICTURE] * 3}, "image_data[2]"),
        (EMBEDDINGS, {"input": [[PART], [PART, PART]]}, "input[1][1].image_url"),
        (RESPONSES, {"input": [user(ITEM, ITEM, ITEM)]}, "input[0].content[2].image_url"),
        (MESSAGES, {"messages": [user(BLOCK, BLOCK, BLOCK)]}, "messages[0].content[2].source.url"),
        (COUNT, {"messages": [user(BLOCK, BLOCK, BLOCK)]}, "messages[0].content[2].source.url"),
        (INTERACTIVE, {"image_url": [PICTURE] * 3}, "image_url[2]"),
        (INTERACTIVE, {"prompt": [user(PART, PART, PART)]}, "prompt[0].content[2].image_url"),
    ],
    "max-messages": [
        (CHAT, {"messages": [user()] * 4}, "messages"),
        (TOKENIZE, {"messages": [user()] * 4}, "messages"),
        (RESPONSES, {"input": [user()] * 4}, "input"),
        (MESSAGES, {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}] * 2}, "messages"),
        (COUNT, {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}] * 2}, "messages"),
        (INTERACTIVE, {"prompt": [user()] * 4}, "prompt"),
    ],
    "max-n": [(CHAT, {"n": 3}, "n"), (COMPLETIONS, {"n": 3}, "n"), (COMPLETIONS, {"best_of": 3}, "best_of")],
    "max-answers": [
        (COMPLETIONS, {"prompt": ["a"] * 5}, "prompt"),
        (COMPLETIONS, {"prompt": [[65]] * 3, "n": 2}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 3, "best_of": 2}, "prompt"),
    ],
    "max-stop-strings": [
        (CHAT, {"stop": ["a", "b", "c"]}, "stop"),
        (COMPLETIONS, {"stop": ["a", "b", "c"]}, "stop"),
        (GENERATE, {"stop": ["a", "b", "c"]}, "stop"),
        (RESPONSES, {"stop": ["a", "b", "c"]}, "stop"),
        (MESSAGES, {"stop_sequences": ["a", "b", "c"]}, "stop_sequences"),
        (INTERACTIVE, {"stop": ["a", "b", "c"]}, "stop"),
    ],
    "max-stop-characters": [
        (CHAT, {"stop": "12345678901"}, "stop"),
        (COMPLETIONS, {"stop": ["123456", "12345"]}, "stop"),
        (GENERATE, {"stop": "12345678901"}, "stop"),
        (RESPONSES, {"stop": "12345678901"}, "stop"),
        (MESSAGES, {"stop_sequences": ["12345678901"]}, "stop_sequences"),
        (INTERACTIVE, {"stop": "12345678901"}, "stop"),
    ],
    "max-schema-characters": [
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": LARGE}}}, "response_format.json_schema.schema"),
        (CHAT, {"response_format": {"type": "regex_schema", "regex_schema": "x" * 201}}, "response_format.regex_schema"),
        (COMPLETIONS, {"structured_outputs": {"json": LARGE}}, "structured_outputs.json"),
        (COMPLETIONS, {"structured_outputs": {"regex": "x" * 201}}, "structured_outputs.regex"),
        (GENERATE, {"structured_outputs": {"choice": ["x" * 201]}}, "structured_outputs.choice"),
        (GENERATE, {"structured_outputs": {"grammar": "x" * 201}}, "structured_outputs.grammar"),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "a", "schema": LARGE}}}, "text.format.schema"),
        (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": LARGE}}}, "output_config.format.schema"),
        (CHAT, {"tools": [TOOL]}, "tools"),
        (TOKENIZE, {"tools": [TOOL]}, "tools"),
        (RESPONSES, {"tools": [{"type": "function", **TOOL["function"]}]}, "tools"),  # type: ignore[dict-item]
        (MESSAGES, {"tools": [{"name": "f", "input_schema": LARGE}]}, "tools"),
        (COUNT, {"tools": [{"name": "f", "input_schema": LARGE}]}, "tools"),
    ],
    "max-prompt-characters": [
        (CHAT, {"messages": TEXT}, "messages"),
        (CHAT, {"messages": [user({"type": "text", "text": "x" * 200}), {"role": "assistant", "content": "x" * 201}]}, "messages"),
        (CHAT, {"messages": [{"role": "assistant", "content": "x", "reasoning_content": TEXT}]}, "messages"),
        (TOKENIZE, {"messages": [user({"type": "text", "text": TEXT})]}, "messages"),
        (TOKENIZE, {"prompt": TEXT, "messages": None}, "prompt"),
        (COMPLETIONS, {"prompt": ["x", TEXT]}, "prompt[1]"),
        (COMPLETIONS, {"suffix": TEXT}, "suffix"),
        (GENERATE, {"prompt": TEXT}, "prompt"),
        (EMBEDDINGS, {"input": ["x", TEXT]}, "input[1]"),
        (EMBEDDINGS, {"input": [{"type": "text", "text": TEXT}]}, "input"),
        (RESPONSES, {"input": TEXT}, "input"),
        (MESSAGES, {"messages": [{"role": "user", "content": TEXT}]}, "messages"),
        (COUNT, {"messages": [{"role": "user", "content": TEXT}]}, "messages"),
        (INTERACTIVE, {"prompt": TEXT}, "prompt"),
        (ENCODE, {"input": ["x", TEXT]}, "input"),
        (ENCODE, {"input": ["x" * 201, "x" * 200]}, "input"),
        (PERPLEXITY, {"input": TEXT}, "input"),
    ],
    "max-json-depth": [(route, {"a_field": json.loads("[" * 20 + "]" * 20)}, "a_field") for route in SMALL],
    "max-json-values": [(route, {"a_field": [0] * 500}, "") for route in SMALL],
    "max-json-containers": [(route, {"a_field": [[]] * 100}, "") for route in SMALL],
}
ALPACAS: dict[str, list[tuple[str, dict[str, Any], str]]] = {
    "max-messages": [(CHAT, {"messages": [{"role": "user", "message": "hi"}] * 4}, "messages")],
    "max-n": [(CHAT, {"n": 3}, "n"), (COMPLETIONS, {"n": 3}, "n")],
    "max-stop-strings": [(CHAT, {"stop": ["a", "b", "c"]}, "stop"), (COMPLETIONS, {"stop": ["a", "b", "c"]}, "stop")],
    "max-stop-characters": [(CHAT, {"stop": "12345678901"}, "stop"), (COMPLETIONS, {"stop": "12345678901"}, "stop")],
    "max-schema-characters": [(CHAT, {"structured_outputs": {"json": LARGE}}, "structured_outputs.json")],
    "max-prompt-characters": [
        (CHAT, {"messages": [{"role": "user", "message": TEXT}]}, "messages"),
        (CHAT, {"messages": TEXT}, "messages"),
        (COMPLETIONS, {"prompt": TEXT}, "prompt"),
        (EMBEDDINGS, {"input": ["x", TEXT]}, "input[1]"),
    ],
    "max-json-depth": [(route, {"a_field": json.loads("[" * 20 + "]" * 20)}, "a_field") for route in (CHAT, COMPLETIONS, EMBEDDINGS)],
    "max-json-values": [(route, {"a_field": [0] * 500}, "") for route in (CHAT, COMPLETIONS, EMBEDDINGS)],
    "max-json-containers": [(route, {"a_field": [[]] * 100}, "") for route in (CHAT, COMPLETIONS, EMBEDDINGS)],
}
CASES = [pytest.param(flag, *case, id=f"{flag}-{case[0]}-{case[2]}") for flag, cases in OVER.items() for case in cases]
ALPACA_CASES = [pytest.param(flag, *case, id=f"{flag}-{case[0]}-{case[2]}") for flag, cases in ALPACAS.items() for case in cases]


@pytest.fixture(scope="module")
def narrow() -> Iterator[RunningServer]:
    with running_server(fake_config(limits=LIMITS)) as server:
        yield server


@pytest.fixture(scope="module")
def alpaca() -> Iterator[RunningServer]:
    with running_server(fake_config(limits=LIMITS, compat=ALPACA)) as server:
        yield server


@pytest.fixture(scope="module")
def small_bodies() -> Iterator[RunningServer]:
    with running_server(fake_config(max_body_bytes=1000)) as server:
        yield server


def post(server: RunningServer, route: str, fields: dict[str, Any]) -> requests.Response:
    body = {"model": server.model, **SMALL[route], **fields}
    headers = {"anthropic-version": "2023-06-01"} if route in (MESSAGES, COUNT) else {}
    return requests.post(server.url + route, json=body, headers=headers, timeout=10)


def assert_refused(response: requests.Response, flag: str, field: str) -> None:
    error = response.json()["error"]
    param = error.get("details", error)["param"]
    assert response.status_code == 400, response.text
    assert param == (field or None), response.text
    assert f"--{flag}" in error["message"], response.text
    assert error["message"].startswith(field)


@pytest.mark.parametrize(("flag", "route", "fields", "field"), CASES)
def test_one_over_a_limit_is_refused_on_every_route(
    narrow: RunningServer, flag: str, route: str, fields: dict[str, Any], field: str
) -> None:
    narrow.backend.reset()

    assert_refused(post(narrow, route, fields), flag, field)
    assert narrow.backend.engine.requests == []


@pytest.mark.parametrize(("flag", "route", "fields", "field"), ALPACA_CASES)
def test_alpacas_routes_have_the_same_limits(alpaca: RunningServer, flag: str, route: str, fields: dict[str, Any], field: str) -> None:
    alpaca.backend.reset()

    assert_refused(post(alpaca, route, fields), flag, field)
    assert alpaca.backend.engine.requests == []


@pytest.mark.parametrize("route", SMALL)
def test_what_is_within_the_limits_is_served(narrow: RunningServer, route: str) -> None:
    response = post(narrow, route, {})

    assert response.status_code == 200 or response.json()["error"]["code"] == REFUSED_ANYWAY[route]


@pytest.mark.parametrize("route", SMALL)
def test_fields_that_a_route_does_not_have_are_not_held_against_limits(narrow: RunningServer, route: str) -> None:
    names = ("messages", "prompt", "stop", "tools", "n", "best_of", "image_url")
    for value in ([], 5, {"a": 1}, [1] * 10, "x"):
        strange = {name: value for name in names if name not in SMALL[route]}

        assert post(narrow, route, strange).status_code < 500 or route == ABORT


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_beams_end_at_a_few_tokens_only(narrow: RunningServer, alpaca: RunningServer, route: str) -> None:
    """With 1,024 of them a step of 32 beams took seconds, of everybody's."""
    many, few = ([*range(3, 3 + count)] for count in (MAX_STOP_TOKEN_IDS_OF_BEAMS + 1, MAX_STOP_TOKEN_IDS_OF_BEAMS))
    for server in (narrow, alpaca):
        refused = post(server, route, {"num_beams": 2, "stop_token_ids": many})

        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "stop_token_ids"
        assert refused.json()["error"]["message"] == "stop_token_ids: 9 token ids; at most 8 are allowed with num_beams above 1"
        assert post(server, route, {"num_beams": 2, "stop_token_ids": few}).status_code == 200
        assert post(server, route, {"num_beams": 1, "stop_token_ids": many}).status_code == 200


def test_as_much_as_a_limit_is_allowed(narrow: RunningServer) -> None:
    at_all_limits = {"messages": [user(PART), user(PART), user()], "n": 2, "stop": ["12345", "67890"]}

    assert post(narrow, CHAT, at_all_limits).status_code == 200
    assert post(narrow, COMPLETIONS, {"prompt": ["a", "x" * 400], "n": 2}).status_code == 200
    assert post(narrow, CHAT, {"a_field": json.loads("[" * 19 + "]" * 19)}).status_code == 200


def test_a_schema_counts_once_for_each_answer(server: RunningServer) -> None:
    """Each answer is a request of its own to the engine."""
    schema = {"type": "string", "enum": ["x" * (MAX_SCHEMA_CHARACTERS - 50)]}

    refused = post(server, COMPLETIONS, {"prompt": ["hi", "ho"], "n": 33, "structured_outputs": {"json": schema}}).json()["error"]

    assert refused["param"] == "structured_outputs.json"
    assert "for each of 66 answers" in refused["message"]
    assert post(server, COMPLETIONS, {"n": 66, "structured_outputs": {"choice": ["x" * 100_000]}}).status_code == 200


def test_a_session_grows_to_the_limits_of_a_request(narrow: RunningServer) -> None:
    turn = {"session_id": 7, "interactive_mode": True, "request_output_len": 4}
    assert post(narrow, INTERACTIVE, turn).status_code == 200  # 2 messages
    assert post(narrow, INTERACTIVE, turn).status_code == 200  # 3, and the answer

    refused = post(narrow, INTERACTIVE, turn)

    assert_refused(refused, "max-messages", "session_id")


def test_a_sessions_pictures_count_in_every_turn(narrow: RunningServer) -> None:
    turn = {"session_id": 8, "interactive_mode": True, "request_output_len": 4}
    assert post(narrow, INTERACTIVE, {**turn, "image_url": [PICTURE, PICTURE]}).status_code == 200

    assert_refused(post(narrow, INTERACTIVE, {**turn, "image_url": PICTURE}), "max-pictures", "session_id")


def test_the_items_of_kept_responses_count(narrow: RunningServer) -> None:
    first = post(narrow, RESPONSES, {"input": [user(ITEM), user(ITEM)]}).json()

    refused = post(narrow, RESPONSES, {"input": [user()] * 2, "previous_response_id": first["id"]})

    assert_refused(refused, "max-messages", "input")


def test_every_route_that_reads_json_is_tried() -> None:
    config = fake_config()
    document = openapi_schema(create_app(config), config)
    bodies = {path: methods["post"].get("requestBody", {"content": {}}) for path, methods in document["paths"].items() if "post" in methods}

    assert {path for path, body in bodies.items() if "application/json" in body["content"]} == set(SMALL)


def test_the_inputs_of_one_embeddings_request_share_its_bytes_and_pixels(narrow: RunningServer) -> None:
    narrow.backend.reset()
    for _ in range(2):
        assert post(narrow, EMBEDDINGS, {"input": [[PART], [PART]]}).status_code == 200

    rooms = narrow.backend.pipeline.rooms

    assert None not in rooms
    assert rooms[0] is rooms[1] is not rooms[2] is rooms[3]


@pytest.mark.parametrize("route", [*SMALL, "/v1/files"])
def test_a_body_over_the_limit_is_a_413_on_every_route(small_bodies: RunningServer, route: str) -> None:
    large = json.dumps({"model": small_bodies.model, **SMALL.get(route, {}), "a_field": "x" * 2000}).encode()
    if route == "/v1/files":
        large = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n' + large
    headers = {"content-type": "multipart/form-data; boundary=x" if route == "/v1/files" else "application/json"}

    for body in (large, iter([large[:500], large[500:]])):  # with its length, and in chunks without
        response = requests.post(small_bodies.url + route, data=body, headers=headers, timeout=10)
        error = response.json()["error"]

        assert (response.status_code, error.get("code") or error["details"]["error_code"]) == (413, "request_too_large")
        assert "--max-body-bytes" in error["message"]


def test_the_chat_templates_process_gets_its_limits() -> None:
    limits = render_limits(RequestLimits(template_timeout_s=1.5, max_prompt_characters=1000))

    assert limits.cpu_s == 1.5
    assert limits.max_characters == 2000 + MAX_TEMPLATE_CHARACTERS


def test_every_limit_is_tried() -> None:
    untried = {"template_timeout_s"}  # of the template's process: see test_jinja_process and test_chat_template
    names = {"max_choices": "max-n"}

    flags = {names.get(name, name.replace("_", "-")) for name in set(RequestLimits.__slots__) - untried}

    assert flags == set(OVER)


@pytest.mark.parametrize(
    ("name", "value"), [("max_pictures", 0), ("max_choices", 129), ("max_stop_strings", 65), ("template_timeout_s", -1)]
)
def test_a_limit_that_cannot_be_is_refused_by_its_name(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}: {value} is not allowed, only"):
        RequestLimits(**{name: value})  # type: ignore[arg-type]
