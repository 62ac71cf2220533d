"""Everything around the answers: ids, error bodies, limits, keys, health, metrics, the docs page."""

import http.client
import json
import logging
import queue
import re
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests.contract.running import MODEL, RunningServer, fake_config, running_server
from vlm_server import __version__
from vlm_server.docs import ASSETS
from vlm_server.protocol import ChatCompletionRequest, CompletionRequest

HELLO = [{"role": "user", "content": "a private question"}]
CHAT = "/v1/chat/completions"


def post(server: RunningServer, path: str = CHAT, headers: dict[str, str] | None = None, **fields: Any) -> requests.Response:
    body = {"model": server.model, "messages": HELLO, **fields}
    return requests.post(server.url + path, json=body, headers=headers, timeout=10)


def get(server: RunningServer, path: str, **headers: str) -> requests.Response:
    return requests.get(server.url + path, headers=headers, timeout=10)


def assert_error(response: requests.Response, status: int, code: str) -> None:
    """Both shapes in one body."""
    body = response.json()
    assert response.status_code == body["code"] == status
    assert body["error"]["code"] == code
    assert body["object"] == "error"
    for key in ("message", "type", "param"):
        assert body[key] == body["error"][key]


def test_a_request_id_is_made_up_where_the_client_sends_none_or_a_strange_one(server: RunningServer) -> None:
    assert re.fullmatch("[0-9a-f]{32}", get(server, "/health").headers["x-request-id"])
    assert get(server, "/health", **{"X-Request-Id": "mine"}).headers["x-request-id"] == "mine"
    assert get(server, "/health", **{"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"


def test_unknown_paths_and_methods_have_error_bodies(server: RunningServer) -> None:
    assert_error(get(server, "/nope"), 404, "not_found")
    assert_error(get(server, CHAT), 405, "method_not_allowed")
    assert_error(get(server, "/v1/models/no/such"), 404, "model_not_found")
    assert_error(post(server, model="no/such"), 404, "model_not_found")


def test_a_body_that_is_no_json_is_refused(server: RunningServer) -> None:
    headers = {"content-type": "application/json"}

    assert_error(requests.post(server.url + CHAT, data="{x", headers=headers, timeout=10), 400, "invalid_json")
    assert_error(requests.post(server.url + CHAT, data="[1]", headers=headers, timeout=10), 400, "invalid_value")
    assert_error(requests.post(server.url + CHAT, data="", headers=headers, timeout=10), 400, "missing_required_parameter")
    assert_error(requests.post(server.url + CHAT, data="[" * 100_000, headers=headers, timeout=10), 400, "json_too_deep")
    assert_error(requests.post(server.url + CHAT, data="{}", timeout=10), 400, "invalid_content_type")


def test_a_body_over_the_limit_is_413_with_and_without_its_length() -> None:
    with running_server(fake_config(max_body_bytes=1000)) as server:
        large = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x" * 2000}]}).encode()
        headers = {"content-type": "application/json"}

        assert_error(requests.post(server.url + CHAT, data=large, headers=headers, timeout=10), 413, "request_too_large")
        chunked = (large[start : start + 100] for start in range(0, len(large), 100))
        assert_error(requests.post(server.url + CHAT, data=chunked, headers=headers, timeout=10), 413, "request_too_large")
        assert post(server, max_tokens=1).status_code == 200


def test_without_keys_every_key_is_welcome(server: RunningServer) -> None:
    assert get(server, "/v1/models", Authorization="Bearer whatever").status_code == 200


def test_with_keys_all_but_health_and_docs_need_one() -> None:
    with running_server(fake_config(api_keys=("first", "second"))) as server:
        for path in ("/v1/models", "/metrics", "/nope", "/v1/models/../../health/x", "//health", "/swagger-ui/../v1/models"):
            assert raw_status(server, path) == 401, path
        for path in ("/health", "/", "/openapi.json", "/swagger-ui/swagger-ui.css"):
            assert raw_status(server, path) == 200, path
        assert_error(post(server), 401, "invalid_api_key")
        for header, status in (("Bearer second", 200), ("bearer first", 200), ("Bearer third", 401), ("Basic first", 401), ("first", 401)):
            assert get(server, "/v1/models", Authorization=header).status_code == status, header


def test_each_key_has_cache_keys_of_its_own() -> None:
    with running_server(fake_config(api_keys=("first", "second"))) as server:
        for path, fields in ((CHAT, {}), ("/v1/completions", {"prompt": "x"})):
            for key in ("first", "second", "first"):
                assert post(server, path, {"Authorization": f"Bearer {key}"}, **fields).status_code == 200
            first, second, again = (prompt.cache_keys[0] for prompt, _ in server.backend.engine.requests[-3:])
            assert first == again != second
        metrics = get(server, "/metrics", Authorization="Bearer first").text
        assert 'vlm:http_requests_total{route="/v1/completions",status="200"} 3.0' in metrics


def raw_status(server: RunningServer, path: str) -> int:
    """Without a client that tidies the path."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def test_browsers_of_all_origins_are_let_in_by_default_and_named_ones_only_when_set(server: RunningServer) -> None:
    preflight = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}

    assert requests.options(server.url + CHAT, headers=preflight, timeout=10).headers["access-control-allow-origin"] == "*"
    with running_server(fake_config(allow_origins=("http://b.example",), api_keys=("k",))) as strict:
        assert requests.options(strict.url + CHAT, headers=preflight, timeout=10).status_code == 400
        refused = requests.get(f"{strict.url}/v1/models", headers={"Origin": "http://b.example"}, timeout=10)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "http://b.example")


class LogLines(logging.Handler):
    """The server's log lines at info; they are written by its thread, after the answer."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: queue.Queue[str] = queue.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.put(record.getMessage())

    def next(self) -> str:
        return self.lines.get(timeout=2)


@pytest.fixture
def log() -> Iterator[LogLines]:
    logger, handler = logging.getLogger("vlm_server"), LogLines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_one_line_per_request_is_logged_without_prompt_or_key(server: RunningServer, log: LogLines) -> None:
    get(server, "/health")  # its line is at debug
    post(server, headers={"Authorization": "Bearer very-secret", "X-Request-Id": "r-1"}, max_tokens=3)
    first = log.next()
    post(server, headers={"X-Request-Id": "r-2"}, max_tokens=3, stream=True)
    second = log.next()

    assert log.lines.empty()
    for line, name in ((first, "r-1"), (second, "r-2")):
        assert f"id={name}" in line
        assert "completion_tokens=3" in line
        assert " 200 " in line
        assert "private" not in line
        assert "secret" not in line


def test_a_line_of_the_log_cannot_be_forged(server: RunningServer, log: LogLines) -> None:
    raw_status(server, "/x%0aINFO%20forged")

    line = log.next()
    assert "forged" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("state", "status", "word"),
    [
        ("ready", 200, "healthy"),
        ("starting", 503, "initializing"),
        ("restarting", 503, "unhealthy"),
        ("failed", 503, "unhealthy"),
        ("closed", 503, "unhealthy"),
    ],
)
def test_health_tells_the_engines_state(server: RunningServer, state: str, status: int, word: str) -> None:
    server.backend.engine.state = state

    response = get(server, "/health")

    assert (response.status_code, response.json()["status"]) == (status, word)
    assert state in response.json()["message"]


def test_health_says_why_the_engine_failed(server: RunningServer) -> None:
    server.backend.engine.state, server.backend.engine.failure = "failed", "the checkpoint lacks a tensor"

    assert "the checkpoint lacks a tensor" in get(server, "/health").json()["message"]


def test_metrics_show_the_engine_and_the_latencies(server: RunningServer) -> None:
    post(server, max_tokens=4)

    text = get(server, "/metrics").text

    for line in (
        "vlm:engine_up 1.0",
        "vlm:max_batch_size 3.0",
        "vlm:prefix_cache_hit_tokens_total 7.0",
        "vlm:embedding_cache_hits_total 2.0",
        "vlm:pictures_total 0.0",
    ):
        assert line in text.splitlines()
    assert re.search(r"^vlm:time_to_first_token_seconds_count [1-9]", text, re.MULTILINE)
    assert re.search(r"^vlm:inter_token_latency_seconds_count [1-9]", text, re.MULTILINE)
    assert 'vlm:http_requests_total{route="/v1/chat/completions",status="200"}' in text


def test_unknown_paths_share_one_metric(server: RunningServer) -> None:
    for number in range(3):
        get(server, f"/scan/{number}")

    assert "/scan/" not in get(server, "/metrics").text


def test_metrics_and_docs_can_be_switched_off() -> None:
    with running_server(fake_config(enable_metrics=False, enable_docs=False)) as server:
        for path in ("/metrics", "/", "/openapi.json"):
            assert get(server, path).status_code == 404


def test_the_model_list_is_openais_with_lmdeploys_permission(server: RunningServer) -> None:
    [card] = get(server, "/v1/models").json()["data"]

    assert (card["id"], card["root"], card["parent"], card["object"]) == (MODEL, "/models/tiny-vlm", None, "model")
    assert card["permission"][0]["object"] == "model_permission"
    assert get(server, f"/v1/models/{MODEL}").json() == card


def test_the_swagger_page_loads_nothing_from_elsewhere(server: RunningServer) -> None:
    page = get(server, "/")

    assert page.headers["content-type"].startswith("text/html")
    assert "//" not in page.text
    for address in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        assert get(server, f"/{address}").status_code == 200, address
    assert "http" not in (ASSETS / "start.js").read_text()
    assert not re.search(r"url\(\s*[\"']?(?:https?:)?//", (ASSETS / "swagger-ui.css").read_text())


def test_the_swagger_page_works_under_a_prefix_that_a_proxy_strips() -> None:
    with running_server(fake_config(root_path="/vlm")) as server:
        for prefix in ("", "/vlm"):
            assert "swagger-ui" in get(server, f"{prefix}/").text
            assert get(server, f"{prefix}/swagger-ui/start.js").status_code == 200
            assert get(server, f"{prefix}/v1/models").status_code == 200
        assert get(server, "/openapi.json").json()["servers"] == [{"url": "/vlm"}]


def test_every_example_of_the_openapi_document_is_answered(server: RunningServer) -> None:
    document = get(server, "/openapi.json").json()

    for path, model in ((CHAT, ChatCompletionRequest), ("/v1/completions", CompletionRequest)):
        examples = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["examples"]
        assert len(examples) >= 2
        for example in examples.values():
            assert model.model_validate(example["value"]).model == MODEL
            assert requests.post(server.url + path, json=example["value"], timeout=10).status_code == 200


def test_an_example_holds_a_picture_of_its_own(server: RunningServer) -> None:
    examples = get(server, "/openapi.json").json()["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["examples"]

    url = examples["image"]["value"]["messages"][0]["content"][1]["image_url"]["url"]

    assert url.startswith("data:image/png;base64,")


def test_the_openapi_document_is_whole(server: RunningServer) -> None:
    document = get(server, "/openapi.json").json()
    text = json.dumps(document)

    schemas = document["components"]["schemas"]
    assert {"ChatCompletionRequest", "ChatCompletionResponse", "CompletionRequest", "ModelList", "ErrorResponse"} <= set(schemas)
    assert set(re.findall(r'"#/components/schemas/([^"]+)"', text)) <= set(schemas)
    assert "<string>" not in text
    for path in (CHAT, "/v1/completions"):
        responses = document["paths"][path]["post"]["responses"]
        assert {"200", "400", "404", "429", "503"} <= set(responses)
        assert "422" not in responses
        assert "text/event-stream" in responses["200"]["content"]
        assert "Server-Timing" in responses["200"]["headers"]
    assert document["info"]["version"] == __version__


def test_responses_have_the_shape_that_the_document_states(server: RunningServer) -> None:
    from vlm_server.response_schema import (
        ChatCompletionResponse,
        ChatCompletionStreamResponse,
        CompletionResponse,
        ErrorResponse,
        HealthResponse,
        ModelList,
    )

    ChatCompletionResponse.model_validate(post(server, logprobs=True, top_logprobs=1).json())
    CompletionResponse.model_validate(post(server, "/v1/completions", prompt="x", logprobs=1).json())
    ModelList.model_validate(get(server, "/v1/models").json())
    HealthResponse.model_validate(get(server, "/health").json())
    ErrorResponse.model_validate(get(server, "/nope").json())
    for line in post(server, stream=True, logprobs=True, stream_options={"include_usage": True}).text.splitlines():
        if line.startswith("data: {"):
            ChatCompletionStreamResponse.model_validate_json(line[6:])


@pytest.mark.parametrize(
    ("path", "allowed"), [("/v1/files", "GET, POST"), ("/v1/responses/x", "GET, DELETE"), ("/v1/chat/completions", "POST")]
)
def test_a_method_that_a_path_does_not_have_is_told_all_that_it_has(server: RunningServer, path: str, allowed: str) -> None:
    answer = requests.put(f"{server.url}{path}", timeout=10)

    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_mounted_files_are_not_said_to_take_what_they_refuse(server: RunningServer, method: str) -> None:
    answer = requests.request(method, f"{server.url}/swagger-ui/swagger-ui.css", timeout=10)

    assert answer.status_code == 405
    assert method not in answer.headers.get("allow", "")
    assert "DELETE" not in answer.headers.get("allow", "")
