"""`/health/live` and `/health/ready` over HTTP: what they say, who may ask for what, and that a probe is nobody's request."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests

from tests.contract.fake_engine import FakeBackend
from tests.contract.running import RunningServer, fake_config, serving
from vlm_server.app import create_app
from vlm_server.config import ServerConfig
from vlm_server.readiness import ProbeReport
from vlm_server.response_schema import LiveResponse, ReadyResponse

PASSED = ProbeReport(stages_s={"template": 0.001, "picture-decode": 0.25, "encode": 1.5, "prefill": 0.5})
FAILED = ProbeReport(stages_s={"template": 0.001}, failed_stage="decode", message="decode: the decoder broke down over the picture")


class ScriptedProbe:
    """Reports what it was told to; counts."""

    def __init__(self, report: ProbeReport) -> None:
        self.report = report
        self.num_calls = 0
        self.has_ended = threading.Event()

    async def __call__(self) -> ProbeReport:
        self.num_calls += 1
        self.has_ended.set()
        return self.report


@contextmanager
def probed_server(probe: Any, config: ServerConfig | None = None) -> Iterator[tuple[RunningServer, Any]]:
    """A server whose first probe has begun, and its app."""
    backend = FakeBackend()
    backend.probe = probe
    app = create_app(config or fake_config(), open_backend=backend.open)
    with serving(app) as url:
        yield RunningServer(url, "org/tiny-vlm", backend), app


def get(server: RunningServer, path: str, **headers: str) -> requests.Response:
    return requests.get(server.url + path, headers=headers, timeout=10)


@pytest.mark.parametrize("state", ["ready", "starting", "restarting", "failed"])
def test_the_server_lives_whatever_the_engine_does(server: RunningServer, state: str) -> None:
    server.backend.engine.state = state

    response = get(server, "/health/live")

    assert (response.status_code, response.json()) == (200, {"status": "live"})
    LiveResponse.model_validate(response.json())


def test_a_server_is_ready_once_a_probe_went_through() -> None:
    with probed_server(ScriptedProbe(PASSED)) as (server, _):
        response = get(server, "/health/ready")

    body = response.json()
    assert (response.status_code, body["status"], body["stage"]) == (200, "ready", None)
    assert body["probe"]["stages_ms"] == {"template": 1.0, "picture-decode": 250.0, "encode": 1500.0, "prefill": 500.0}
    ReadyResponse.model_validate(body)


def test_a_failed_probe_is_a_503_that_names_the_stage() -> None:
    with probed_server(ScriptedProbe(FAILED)) as (server, _):
        response = get(server, "/health/ready")

        assert get(server, "/health").status_code == 200  # as it was: the engine alone

    assert (response.status_code, response.json()["status"], response.json()["stage"]) == (503, "not_ready", "decode")
    assert response.json()["message"] == FAILED.message
    assert int(response.headers["retry-after"]) > 0
    ReadyResponse.model_validate(response.json())


@pytest.mark.parametrize("state", ["starting", "restarting", "failed", "closed"])
def test_without_an_engine_a_server_is_not_ready(server: RunningServer, state: str) -> None:
    server.backend.engine.state = state

    response = get(server, "/health/ready")

    assert (response.status_code, response.json()["stage"]) == (503, "engine")
    assert state in response.json()["message"]


def test_a_server_that_was_told_to_stop_is_not_ready_and_still_lives() -> None:
    with probed_server(ScriptedProbe(PASSED)) as (server, app):
        app.state.readiness.drain()

        assert get(server, "/health/ready").json()["stage"] == "draining"
        assert get(server, "/health/ready?probe=true").status_code == 503
        assert get(server, "/health/live").status_code == 200


def test_on_demand_a_probe_is_done_again_but_never_right_after_another() -> None:
    probe = ScriptedProbe(PASSED)
    with probed_server(probe) as (server, app):
        assert probe.has_ended.wait(10)
        for _ in range(30):
            assert get(server, "/health/ready?probe=true").status_code == 200
        assert probe.num_calls == 1

        app.state.readiness._ended_s -= 100
        probe.report = FAILED
        assert get(server, "/health/ready?probe=true").status_code == 503

    assert probe.num_calls == 2


def test_with_keys_health_needs_none_but_asking_for_a_probe_does() -> None:
    probe = ScriptedProbe(PASSED)
    with probed_server(probe, fake_config(api_keys=("secret",))) as (server, app):
        for path in ("/health", "/health/live", "/health/ready", "/health/ready?probe=false"):
            assert get(server, path).status_code == 200, path
        app.state.readiness._ended_s -= 100

        for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": ""}):
            refused = get(server, "/health/ready?probe=true", **headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert probe.num_calls == 1
        assert get(server, "/health/ready?probe=true", Authorization="Bearer secret").status_code == 200

    assert probe.num_calls == 2


def test_a_probe_that_is_neither_true_nor_false_is_a_400_that_names_it(server: RunningServer) -> None:
    response = get(server, "/health/ready?probe=maybe")

    assert (response.status_code, response.json()["error"]["param"]) == (400, "probe")


def test_a_probe_is_charged_to_nobody_and_its_requests_are_logged_quietly(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "keys.toml").write_text('[[keys]]\nname = "alice"\nkey = "secret"\nrequests_per_minute = 1\ntokens_per_minute = 1\n')
    with probed_server(ScriptedProbe(PASSED), fake_config(api_key_files=(str(tmp_path / "keys.toml"),))) as (server, _):
        with caplog.at_level("INFO", logger="vlm_server"):
            for _ in range(5):
                assert get(server, "/health/ready?probe=true", **{"x-api-key": "secret"}).status_code == 200
                assert get(server, "/health/live", **{"x-api-key": "secret"}).status_code == 200
        left = get(server, "/v1/models", **{"x-api-key": "secret"}).headers

    assert left["x-ratelimit-remaining-requests"] == "0"  # this one's alone
    assert left["x-ratelimit-remaining-tokens"] == "1"
    assert not [record for record in caplog.records if "health" in record.getMessage()]
