"""Quotas over HTTP: what each route is charged, what a client is told, and what the log and the metrics say."""

import functools
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import requests
from openai import OpenAI, RateLimitError

from engine.request import EngineDeadError, QueueFullError
from tests.contract.running import RunningServer, fake_config, running_server
from tests.vlm_server.fake_clock import NS_PER_S, FakeClock
from tests.vlm_server.test_http import LogLines, log  # noqa: F401
from vlm_server.admission import duration
from vlm_server.quotas import Quota

CHAT = "/v1/chat/completions"
SHORT: Any = {"role": "user", "content": "x"}

Serve = Callable[..., AbstractContextManager[RunningServer]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr("vlm_server.app.Quota", functools.partial(Quota, clock_ns=clock))
    return clock


@pytest.fixture
def serve(clock: FakeClock, tmp_path: Path) -> Serve:
    """A server with a key `alice` of the given limits, `bob` with the same and `free` without any."""

    def serve(**limits: float) -> AbstractContextManager[RunningServer]:
        lines = "".join(f"{kind}_per_minute = {limit}\n" for kind, limit in limits.items())
        keys = "".join(f'[[keys]]\nname = "{name}"\nkey = "{name}-longer-secret"\n{lines}' for name in ("alice", "bob"))
        (tmp_path / "keys.toml").write_text(keys + '[[keys]]\nname = "free"\nkey = "free-longer-secret"\n')
        return running_server(fake_config(api_key_files=(str(tmp_path / "keys.toml"),)))

    return serve


def ask(server: RunningServer, path: str = CHAT, *, key: str = "alice", **fields: Any) -> requests.Response:
    body = {"model": server.model, **({"messages": [SHORT]} if path == CHAT else {}), **fields}
    return requests.post(server.url + path, json=body, headers={"Authorization": f"Bearer {key}-longer-secret"}, timeout=10)


def get(server: RunningServer, path: str, *, key: str = "alice") -> requests.Response:
    return requests.get(server.url + path, headers={"x-api-key": f"{key}-longer-secret"}, timeout=10)


def remaining(response: requests.Response, kind: str) -> int:
    return int(response.headers[f"x-ratelimit-remaining-{kind}"])


def tokens_left(server: RunningServer) -> int:
    return remaining(get(server, "/v1/models"), "tokens")


def assert_refused(response: requests.Response, kind: str, *, retry_after_s: int) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (429, "quota_exceeded", "rate_limit_error")
    assert response.headers["retry-after"] == str(retry_after_s)
    assert "'alice'" in error["message"]
    assert f" {kind} per minute" in error["message"]
    assert "secret" not in response.text


def test_requests_beyond_the_quota_wait_as_long_as_they_are_told(serve: Serve, clock: FakeClock) -> None:
    with serve(requests=3) as server:
        assert [remaining(get(server, "/v1/models"), "requests") for _ in range(3)] == [2, 1, 0]
        assert_refused(get(server, "/v1/models"), "requests", retry_after_s=20)
        assert_refused(ask(server), "requests", retry_after_s=20)
        clock.advance(s=19.9)
        assert_refused(ask(server), "requests", retry_after_s=1)
        assert not server.backend.engine.requests
        clock.advance(s=0.1)

        assert ask(server).status_code == 200
        assert_refused(ask(server), "requests", retry_after_s=20)


def test_each_key_has_a_quota_of_its_own_and_a_key_without_one_is_told_nothing(serve: Serve) -> None:
    with serve(requests=1) as server:
        assert get(server, "/v1/models").status_code == 200
        assert get(server, "/v1/models").status_code == 429
        assert get(server, "/v1/models", key="bob").status_code == 200
        for _ in range(3):
            free = get(server, "/v1/models", key="free")
            assert free.status_code == 200
            assert not [name for name in free.headers if name.startswith("x-ratelimit")]


def test_the_headers_are_openais(serve: Serve, clock: FakeClock) -> None:
    with serve(requests=60, tokens=6000, megapixels=1.5) as server:
        answered = ask(server, max_tokens=5)
        used = answered.json()["usage"]["total_tokens"]
        headers = {name: value for name, value in get(server, "/v1/models").headers.items() if name.startswith("x-ratelimit")}

    assert headers == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "58",
        "x-ratelimit-reset-requests": "2s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": str(6000 - used),
        "x-ratelimit-reset-tokens": f"{used * 10}ms",
        "x-ratelimit-limit-megapixels": "1.5",
        "x-ratelimit-remaining-megapixels": "1.5",
        "x-ratelimit-reset-megapixels": "0ms",
    }


@pytest.mark.parametrize(
    ("span_ns", "text"),
    [(0, "0ms"), (1, "1ms"), (999_000_000, "999ms"), (999_000_001, "1s"), (59 * NS_PER_S + 1, "1m0s"), (360 * NS_PER_S, "6m0s")],
)
def test_durations_are_rounded_up(span_ns: int, text: str) -> None:
    assert duration(span_ns) == text


CHARGED: dict[str, dict[str, Any]] = {
    "chat": {"path": CHAT},
    "chat stream": {"path": CHAT, "stream": True, "stream_options": {"include_usage": True}},
    "several answers": {"path": CHAT, "n": 3, "seed": 1},
    "completion": {"path": "/v1/completions", "prompt": ["abc", "defg"], "max_tokens": 4},
    "turn": {"path": "/v1/chat/interactive", "prompt": "hi", "session_id": 7, "interactive_mode": True},
    "turn stream": {"path": "/v1/chat/interactive", "prompt": "hi", "stream": True},
    "embeddings": {"path": "/v1/embeddings", "input": ["abc", "de", "f"]},
}


def usage_of(response: requests.Response) -> int:
    """As the response states it."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.strip(" \n")]
    last = json.loads([line for line in lines if line != "[DONE]"][-1])
    if "usage" in last:
        return int(last["usage"]["total_tokens"])
    return int(last["input_tokens"] + last["history_tokens"] + last["tokens"])


@pytest.mark.parametrize("name", CHARGED)
def test_a_route_is_charged_what_its_usage_says(serve: Serve, name: str) -> None:
    with serve(tokens=100_000) as server:
        response = ask(server, **CHARGED[name])

        assert response.status_code == 200
        assert 100_000 - tokens_left(server) == usage_of(response) > 0


def test_a_text_that_is_scored_is_charged_its_tokens(serve: Serve) -> None:
    with serve(tokens=100_000) as server:
        assert ask(server, "/get_ppl", input="four").status_code == 200
        assert 100_000 - tokens_left(server) == 4


@pytest.mark.parametrize("name", CHARGED)
def test_with_its_tokens_used_up_a_route_is_refused_before_the_engine_works(serve: Serve, clock: FakeClock, name: str) -> None:
    with serve(tokens=60) as server:
        assert ask(server, prompt="x" * 119, path="/v1/completions", max_tokens=1).status_code == 200
        num_requests = len(server.backend.engine.requests)

        assert_refused(ask(server, **CHARGED[name]), "tokens", retry_after_s=61)
        assert len(server.backend.engine.requests) == num_requests
        clock.advance(s=61)
        assert ask(server, **CHARGED[name]).status_code == 200


def test_with_its_tokens_used_up_a_key_may_still_list_models_and_count_tokens(serve: Serve) -> None:
    with serve(tokens=60, requests=100) as server:
        ask(server, prompt="x" * 119, path="/v1/completions", max_tokens=1)

        assert get(server, "/v1/models").status_code == 200
        assert ask(server, "/tokenize", messages=[SHORT]).status_code == 200
        assert ask(server, "/v1/chat/interactive", prompt="", session_id=1, cancel=True).status_code == 200


def test_an_answer_under_way_is_never_cut_off(serve: Serve) -> None:
    with serve(tokens=1) as server:
        response = ask(server, n=2)

        assert [choice["finish_reason"] for choice in response.json()["choices"]] == ["stop", "stop"]
        assert_refused(ask(server), "tokens", retry_after_s=60 * response.json()["usage"]["total_tokens"])


def test_what_the_server_cannot_take_is_not_counted(serve: Serve) -> None:
    with serve(requests=10, tokens=1000) as server:
        for refusal, status in ((QueueFullError(5), 429), (EngineDeadError("gone"), 503)):
            server.backend.engine.refusal = refusal
            for fields in ({}, {"n": 3}, {"stream": True}):
                response = ask(server, **fields)
                assert response.status_code == status
                assert remaining(response, "requests") == 10
        server.backend.engine.refusal = None
        last = get(server, "/v1/models")

        assert (remaining(last, "requests"), remaining(last, "tokens")) == (9, 1000)


def test_a_request_that_was_wrong_counts_as_a_request_and_as_no_tokens(serve: Serve) -> None:
    with serve(requests=10, tokens=1000) as server:
        for response in (ask(server, temperature=9), ask(server, model="nope"), get(server, "/nope"), ask(server, messages="x" * 600)):
            assert response.status_code in (400, 404)
        last = get(server, "/v1/models")

        assert (remaining(last, "requests"), remaining(last, "tokens")) == (5, 1000)


def test_tokens_are_charged_while_they_are_written(serve: Serve) -> None:
    with serve(tokens=1000) as server:
        server.backend.engine.hangs_after = 5
        headers = {"Authorization": "Bearer alice-longer-secret"}
        body = {"model": server.model, "messages": [SHORT], "stream": True}
        with requests.post(server.url + CHAT, json=body, headers=headers, stream=True, timeout=10) as response:
            lines = response.iter_lines()
            assert any(b'"content":"H"' in line for line in lines)
            prompt_tokens = len(server.backend.engine.requests[0][0].token_ids)
            assert 1000 - tokens_left(server) > prompt_tokens
        assert server.backend.activity.was_left_within(5)

        assert 1000 - tokens_left(server) == prompt_tokens + 5


def test_one_who_leaves_before_the_answer_is_charged_the_prompt(serve: Serve) -> None:
    with serve(tokens=1000) as server:
        server.backend.engine.hangs_after = 0
        headers = {"Authorization": "Bearer alice-longer-secret"}
        for path, fields in ((CHAT, {"messages": [SHORT]}), ("/v1/chat/interactive", {"prompt": "hi"})):
            before = tokens_left(server)
            with pytest.raises(requests.ReadTimeout):
                requests.post(server.url + path, json={"model": server.model, **fields}, headers=headers, timeout=0.3)
            assert server.backend.activity.is_idle_within(5)
            assert before - tokens_left(server) == len(server.backend.engine.requests[-1][0].token_ids)


def test_an_engine_that_dies_before_the_first_token_costs_nothing(serve: Serve) -> None:
    with serve(tokens=1000) as server:
        server.backend.engine.fails_after = 0
        assert ask(server).status_code == 503
        assert tokens_left(server) == 1000
        server.backend.engine.fails_after = 3
        assert ask(server).status_code == 503

        assert 1000 - tokens_left(server) == len(server.backend.engine.requests[-1][0].token_ids) + 3


def test_log_and_metrics_name_the_key_by_its_name(serve: Serve, log: LogLines) -> None:  # noqa: F811
    with serve(requests=2) as server:
        ask(server, max_tokens=3)
        answered = log.next()
        ask(server, key="wrong")
        unknown = log.next()
        get(server, "/v1/models")
        log.next()
        for _ in range(2):
            get(server, "/v1/models")
        refused = [log.next() for _ in range(2)][-1]
        metrics = get(server, "/metrics", key="free").text

    for line, words in ((answered, [" 200 ", "key=alice"]), (refused, [" 429 ", "key=alice", "error=quota_exceeded"])):
        assert [word for word in words if word not in line] == []
    assert " 401 " in unknown
    assert "key=" not in unknown
    assert 'vlm:quota_refusals_total{key="alice",kind="requests"} 2.0' in metrics
    assert "secret" not in answered + unknown + refused + metrics


def test_a_page_of_another_origin_may_read_what_is_left(serve: Serve) -> None:
    with serve(requests=1, tokens=1) as server:
        headers = {"x-api-key": "alice-longer-secret", "Origin": "http://a.example"}
        answers = [requests.get(f"{server.url}/v1/models", headers=headers, timeout=10) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [200, 429]
    for answer in answers:
        exposed = {name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")}
        assert {name.lower() for name in answer.headers if name.lower().startswith("x-ratelimit")} <= exposed
        assert {"x-request-id", "server-timing", "retry-after"} <= exposed
        assert answer.headers["access-control-allow-origin"] == "*"


def test_health_and_docs_are_not_counted(serve: Serve) -> None:
    with serve(requests=1) as server:
        for path in ("/health", "/", "/openapi.json", "/ui"):
            assert get(server, path).status_code == 200
        assert get(server, "/v1/models").status_code == 200
        assert get(server, "/v1/models").status_code == 429
        assert get(server, "/health").status_code == 200


def test_openais_client_sees_a_rate_limit_and_reads_what_is_left(serve: Serve) -> None:
    with serve(requests=1) as server, OpenAI(base_url=f"{server.url}/v1", api_key="alice-longer-secret", max_retries=0) as client:
        answered = client.chat.completions.with_raw_response.create(model=server.model, messages=[SHORT])
        with pytest.raises(RateLimitError) as caught:
            client.models.list()

    assert (answered.headers["x-ratelimit-limit-requests"], answered.headers["x-ratelimit-remaining-requests"]) == ("1", "0")
    assert caught.value.code == "quota_exceeded"
    assert caught.value.response.headers["retry-after"] == "60"
