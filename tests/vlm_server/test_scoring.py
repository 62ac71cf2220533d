"""`/get_ppl` and `/pooling`, and the calls of operators: `/is_sleeping` and `/terminate`."""

import os
import signal
from typing import Any

import pytest
import requests

from tests.contract.running import RunningServer, fake_config, running_server


def post(server: RunningServer, path: str, **fields: Any) -> requests.Response:
    return requests.post(f"{server.url}{path}", json=fields, timeout=10)


def test_the_perplexity_is_the_mean_over_all_tokens_but_the_first(server: RunningServer) -> None:
    assert post(server, "/get_ppl", input=[97, 98, 99]).json() == {"ppl": 1.5}  # what the scripted engine gives each token
    assert post(server, "/get_ppl", input="some text", model=server.model).json() == {"ppl": 1.5}
    assert [params.max_tokens for _, params in server.backend.engine.requests] == [0, 0]


@pytest.mark.parametrize("fields", [{}, {"input": [97]}, {"input": ["a", "b"]}, {"input": 3}])
def test_what_cannot_be_scored_is_refused(server: RunningServer, fields: dict[str, Any]) -> None:
    response = post(server, "/get_ppl", **fields)

    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("input")


def test_pooling_says_that_the_model_has_no_reward_head(server: RunningServer) -> None:
    response = post(server, "/pooling", input="a")

    assert response.status_code == 400
    assert "no reward head" in response.json()["error"]["message"]


def test_the_server_never_sleeps(server: RunningServer) -> None:
    assert requests.get(f"{server.url}/is_sleeping", timeout=10).json() == {"is_sleeping": False}


def test_terminating_is_refused_unless_it_is_allowed(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr("vlm_server.routes.control.os.kill", lambda *arguments: sent.append(arguments))

    assert requests.get(f"{server.url}/terminate", timeout=10).status_code == 400
    assert sent == []
    with running_server(fake_config(allow_terminate_by_client=True)) as other:
        assert requests.get(f"{other.url}/terminate", timeout=10).status_code == 200
    assert sent == [(os.getpid(), signal.SIGTERM)]
