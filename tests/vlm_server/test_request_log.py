"""The log: one line per request, as text or as JSON, with what it cost and without what anybody said, sent or is let in by."""

import io
import json
import logging
import queue
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from engine.log_lines import JsonLines, set_up_logging
from tests.contract.fake_engine import DEFAULT_REPLY, FIRST_TOKEN_S
from tests.contract.running import MODEL, RunningServer, fake_config, running_server
from vlm_server.cli import parse
from vlm_server.examples import RED_CIRCLE
from vlm_server.flags import values_for

KEY = "hush-hush-key"
PROMPT = "a-private-question"
URL = "http://pictures.example/secret-path.png?sig=signed-token"
CHAT = "/v1/chat/completions"


class Lines(logging.Handler):
    """Everything that any logger writes, in one format; by the server's thread, after the answer."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(formatter)
        self.texts: list[str] = []
        self._requests: queue.Queue[dict[str, Any]] = queue.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))
        if hasattr(record, "fields"):
            self._requests.put(record.fields)

    def next_request(self) -> dict[str, Any]:
        return self._requests.get(timeout=5)


def listening(formatter: logging.Formatter) -> Iterator[Lines]:
    root, handler = logging.getLogger(), Lines(formatter)
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield handler
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture
def lines() -> Iterator[Lines]:
    yield from listening(JsonLines())


@pytest.fixture(params=["json", "text"])
def lines_of_both(request: pytest.FixtureRequest) -> Iterator[Lines]:
    yield from listening(JsonLines() if request.param == "json" else logging.Formatter("%(levelname)s %(message)s"))


def chat(server: RunningServer, content: Any = PROMPT, *, headers: dict[str, str] | None = None, **fields: Any) -> requests.Response:
    body = {"model": server.model, "messages": [{"role": "user", "content": content}], "max_tokens": 3, **fields}
    return requests.post(server.url + CHAT, json=body, headers=headers, timeout=10)


def test_a_requests_line_says_what_it_was_what_it_cost_and_how_it_ended(lines: Lines) -> None:
    with running_server(fake_config(api_keys=(KEY,))) as server:
        content = [{"type": "image_url", "image_url": {"url": RED_CIRCLE}}, {"type": "text", "text": PROMPT}]
        answer = chat(server, content, headers={"Authorization": f"Bearer {KEY}", "X-Request-Id": "r-1"})

        line = lines.next_request()

    assert answer.status_code == 200
    usage = answer.json()["usage"]
    assert {name: line[name] for name in ("message", "id", "method", "route", "status", "model", "pictures", "finish_reason")} == {
        "message": "request",
        "id": "r-1",
        "method": "POST",
        "route": CHAT,
        "status": 200,
        "model": MODEL,
        "pictures": 1,
        "finish_reason": "length",
    }
    assert (line["prompt_tokens"], line["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert (line["image_tokens"], line["cached_tokens"]) == (4, 2)
    assert line["key"] != KEY
    assert set(FIRST_TOKEN_S) | {"template", "pictures", "tokenize", "generate"} == set(line["stages_ms"])
    assert 0 < line["first_token_ms"] <= line["duration_ms"]
    assert "error" not in line


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_request_has_its_code(server: RunningServer, lines: Lines, stream: bool) -> None:
    chat(server, [{"type": "image_url", "image_url": {"url": "http://bad.example/x"}}], stream=stream)

    line = lines.next_request()

    assert (line["status"], line["error"], line["route"]) == (400, "image_decode_failed", CHAT)


def test_a_stream_that_broke_has_the_code_of_what_broke_it(server: RunningServer, lines: Lines) -> None:
    server.backend.engine.fails_after = 2

    chat(server, stream=True)

    line = lines.next_request()
    assert (line["status"], line["error"]) == (200, "engine_unavailable")


@pytest.mark.parametrize("route", [CHAT, "/v1/chat/interactive"])
def test_a_stream_that_its_client_left_is_unfinished(server: RunningServer, lines: Lines, route: str) -> None:
    server.backend.engine.hangs_after = 2
    body = {"model": server.model, "stream": True, "messages": [{"role": "user", "content": PROMPT}]}

    with requests.post(server.url + route, json=body, stream=True, timeout=10) as response:
        next(response.iter_content(1))

    line = lines.next_request()
    assert (line["status"], line["finish_reason"], line["completion_tokens"] > 0) == (200, "unfinished", True)


@pytest.mark.parametrize("route", [CHAT, "/v1/chat/interactive"])
def test_a_whole_answer_that_failed_is_unfinished_and_has_its_tokens(server: RunningServer, lines: Lines, route: str) -> None:
    server.backend.engine.fails_after = 5

    requests.post(server.url + route, json={"model": server.model, "messages": [{"role": "user", "content": PROMPT}]}, timeout=10)

    line = lines.next_request()
    assert (line["status"], line["error"], line["finish_reason"]) == (503, "engine_unavailable", "unfinished")
    assert (line["prompt_tokens"] > 0, line["completion_tokens"]) == (True, 5)


@pytest.mark.parametrize("route", [CHAT, "/v1/chat/interactive"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_its_client_did_not_wait_for_is_unfinished(server: RunningServer, lines: Lines, route: str, stream: bool) -> None:
    server.backend.engine.hangs_after = 0 if stream else 5
    content = json.dumps({"model": server.model, "messages": [{"role": "user", "content": PROMPT}], "stream": stream}).encode()
    head = f"POST {route} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    host, port = server.url.removeprefix("http://").split(":")

    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(head.encode() + content)
        assert server.backend.activity.has_begun_within(5)

    line = lines.next_request()
    assert (line["status"], line["error"], line["finish_reason"]) == (499, "client_closed_request", "unfinished")
    assert (line["prompt_tokens"] > 0, line["completion_tokens"] <= 5) == (True, True)


@pytest.mark.parametrize("route", [CHAT, "/v1/messages", "/v1/files"])
def test_a_client_that_leaves_in_its_body_is_no_client_that_sent_a_wrong_one(server: RunningServer, lines: Lines, route: str) -> None:
    form, json_text = ("multipart/form-data; boundary=B", b"--B\r\n"), ("application/json", b'{"model": ')
    media_type, begun = form if route == "/v1/files" else json_text
    head = f"POST {route} HTTP/1.1\r\nHost: a\r\nContent-Type: {media_type}\r\nContent-Length: 1000\r\n\r\n"
    host, port = server.url.removeprefix("http://").split(":")

    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(head.encode() + begun)

    line = lines.next_request()
    assert (line["route"], line["status"], line["error"]) == (route, 499, "client_closed_request")


def test_a_path_that_no_route_has_is_not_in_the_line(server: RunningServer, lines: Lines) -> None:
    requests.get(f"{server.url}/{KEY}?key={KEY}", timeout=10)

    line = lines.next_request()

    assert (line["route"], line["status"], line["error"]) == ("other", 404, "not_found")
    assert KEY not in "".join(lines.texts)


def test_nobodys_prompt_answer_picture_address_or_key_is_in_the_log(lines_of_both: Lines) -> None:
    part = {"type": "image_url", "image_url": {"url": URL}}
    bad = {"type": "image_url", "image_url": {"url": URL.replace("secret", "bad-secret")}}
    key = {"Authorization": f"Bearer {KEY}"}
    with running_server(fake_config(api_keys=(KEY,))) as server:
        answers = [
            chat(server, [part, {"type": "text", "text": PROMPT}], headers=key),
            chat(server, [part, {"type": "text", "text": PROMPT}], headers=key, stream=True, return_timings=True),
            chat(server, [bad, {"type": "text", "text": PROMPT}], headers=key),
            chat(server, [{"type": "image_url", "image_url": {"url": RED_CIRCLE}}], headers=key),
            chat(server, headers={"Authorization": "Bearer stolen-other-key"}),
            chat(server, headers={"x-api-key": "stolen-other-key"}),
            chat(server, headers=key, temperature=PROMPT),
            chat(server, headers=key, model=PROMPT),
            chat(server, headers=key, **{PROMPT: 1}),
            requests.post(f"{server.url}/v1/completions", json={"model": MODEL, "prompt": PROMPT}, headers=key, timeout=10),
            requests.post(f"{server.url}/generate", json={"prompt": PROMPT, "image_data": URL}, headers=key, timeout=10),
            requests.post(f"{server.url}/v1/chat/interactive", json={"prompt": PROMPT, "image_url": URL}, headers=key, timeout=10),
            requests.post(f"{server.url}/v1/responses", json={"input": PROMPT}, headers=key, timeout=10),
            requests.post(f"{server.url}/v1/embeddings", json={"model": MODEL, "input": PROMPT}, headers=key, timeout=10),
            requests.post(f"{server.url}/tokenize", json={"prompt": PROMPT}, headers=key, timeout=10),
            requests.post(f"{server.url}/generate?prompt={PROMPT}", data=PROMPT, headers=key, timeout=10),
        ]
        for _ in answers:
            lines_of_both.next_request()

    log = "\n".join(lines_of_both.texts)
    assert {answer.status_code for answer in answers} >= {200, 400, 401, 404}
    for secret in (PROMPT, "pictures.example", "secret-path", "signed-token", RED_CIRCLE[-40:], KEY, "stolen-other-key", DEFAULT_REPLY[:5]):
        assert secret not in log


def test_lines_of_json_are_objects_whatever_is_logged() -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonLines())
    logger = logging.Logger("anything")
    logger.addHandler(handler)

    logger.warning("two\nlines, “quotes” and %s", {"a": b"\xff"})
    logger.info("unseen", extra={"fields": {"message": "request", "status": 200, "odd": object()}})
    try:
        raise ValueError("what went wrong")
    except ValueError:
        logger.exception("failed")

    first, second, third = map(json.loads, written.getvalue().splitlines())
    assert (first["level"], first["logger"]) == ("WARNING", "anything")
    assert first["message"].startswith("two\nlines")
    assert (second["message"], second["status"]) == ("request", 200)
    assert "unseen" not in str(second)
    assert (third["message"], third["exception"].splitlines()[-1]) == ("failed", "ValueError: what went wrong")


def test_the_flag_sets_the_format_of_the_engine_process_too() -> None:
    assert values_for("engine", parse(["serve", "--log-format", "json"]))["log_format"] == "json"
    assert values_for("engine", parse(["serve"]))["log_format"] == "text"


@pytest.mark.parametrize(("log_format", "kind"), [("json", JsonLines), ("text", logging.Formatter)])
def test_logging_is_set_up_once(monkeypatch: pytest.MonkeyPatch, log_format: str, kind: type) -> None:
    root = logging.RootLogger(logging.WARNING)
    monkeypatch.setattr(logging, "root", root)

    set_up_logging("INFO", log_format)
    set_up_logging("DEBUG", "text")

    [handler] = root.handlers
    assert type(handler.formatter) is kind
    assert root.level == logging.INFO
