"""Pages of other origins: which are let in, and what they may send and read."""

from collections.abc import Iterator

import pytest
import requests

from tests.contract.running import RunningServer, fake_config, running_server

CHAT = "/v1/chat/completions"
OURS, OTHERS = "http://ours.example", "http://others.example"


@pytest.fixture(scope="module")
def keyed() -> Iterator[RunningServer]:
    with running_server(fake_config(api_keys=("right",), allow_origins=(OURS,), allow_credentials=True)) as server:
        yield server


def preflight(server: RunningServer, origin: str, path: str = CHAT) -> requests.Response:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, x-api-key, content-type"}
    return requests.options(server.url + path, headers={"Origin": origin, **asked}, timeout=10)


def allowed_origin(response: requests.Response) -> str | None:
    return response.headers.get("access-control-allow-origin")


def test_by_default_every_origin_is_let_in_without_credentials(server: RunningServer) -> None:
    asked = preflight(server, OTHERS)
    answered = requests.get(f"{server.url}/v1/models", headers={"Origin": OTHERS}, timeout=10)

    for response in (asked, answered):
        assert (response.status_code, allowed_origin(response)) == (200, "*")
        assert "access-control-allow-credentials" not in response.headers
    assert {"authorization", "x-api-key"} <= set(asked.headers["access-control-allow-headers"].split(", "))


def test_a_preflight_brings_no_key_and_needs_none(keyed: RunningServer) -> None:
    for path in (CHAT, "/v1/models", "/nope"):
        asked = preflight(keyed, OURS, path)

        assert (asked.status_code, allowed_origin(asked)) == (200, OURS)
        assert asked.headers["access-control-allow-credentials"] == "true"
        assert "Origin" in asked.headers["vary"]


def test_an_origin_that_is_not_named_is_refused_and_never_mirrored(keyed: RunningServer) -> None:
    asked = preflight(keyed, OTHERS)
    answered = requests.get(f"{keyed.url}/v1/models", headers={"Origin": OTHERS, "Authorization": "Bearer right"}, timeout=10)

    assert (asked.status_code, answered.status_code) == (400, 200)
    for response in (asked, answered):
        assert allowed_origin(response) is None
    for origin in ("null", f"{OURS}.others.example", OURS.upper(), f"{OURS}/", f"{OURS}:8080"):
        assert allowed_origin(preflight(keyed, origin)) is None, origin


def test_a_page_can_read_why_it_was_refused(keyed: RunningServer) -> None:
    refused = requests.post(keyed.url + CHAT, json={}, headers={"Origin": OURS}, timeout=10)

    assert (refused.status_code, allowed_origin(refused)) == (401, OURS)


def test_methods_and_headers_can_be_named() -> None:
    config = fake_config(allow_origins=(OURS,), allow_methods=("GET",), allow_headers=("content-type",))
    with running_server(config) as server:
        refused = preflight(server, OURS)

    assert refused.status_code == 400
    assert "method" in refused.text
    assert "headers" in refused.text


@pytest.mark.parametrize("origins", [("*",), (OURS, "*")])
def test_credentials_for_every_origin_are_refused_at_the_start(origins: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="allow_credentials: True is not allowed, only with --allow-origins that are named"):
        fake_config(allow_origins=origins, allow_credentials=True)
