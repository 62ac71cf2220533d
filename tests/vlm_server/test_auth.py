"""Who is let in: which paths are open, under which headers a key may come, and how keys change while the server runs."""

import hashlib
import http.client
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from starlette.types import Message, Receive, Scope, Send

from tests.contract.running import RunningServer, fake_config, running_server
from tests.vlm_server.fake_clock import FakeClock
from vlm_server.api_keys import ApiKeysError, load_keys
from vlm_server.auth import KeyRing, RequireApiKey
from vlm_server.docs import ASSETS
from vlm_server.quotas import REQUESTS, Quota

PREFIX = "/vlm"
OPEN = ("/health", "/", "/openapi.json", *(f"/swagger-ui/{path.name}" for path in ASSETS.iterdir()), "/health/live", "/health/ready")
PROTECTED = ("/v1/models", "/v1/chat/completions", "/v1/chat/interactive", "/v1/embeddings", "/metrics", "/tokenize", "/terminate", "/nope")
# How a protected path, written without its first slash, may be dressed up as an open one or as another spelling of itself.
SPELLINGS = (
    *("/{}", "//{}", "///{}", "/./{}", "/{}/", "/{}//", "/{}/.", "/%2f{}", "/%2F%2f{}", "/x/../{}", "/{}?api_key=right&key=right"),
    *("/health/../{}", "/health/%2e%2e/{}", "/health/%2E%2E%2F{}", "/health/..%2f{}", "/health/..;/{}", "/health//../{}"),
    *("/health/{}", "/health;/{}", "/health%00/{}", "/health%3f/{}", "/health%23/{}", "/health\\..\\{}", "/health/..%5c{}"),
    *("/HEALTH/../{}", "/health%2f..%2f{}"),
    *("/openapi.json/../{}", "/openapi.json/{}", "/ui/../{}", "/ui/%2e%2e/{}", "/ui/{}", "/ui/app.js/../../{}"),
    *("/swagger-ui/../{}", "/swagger-ui/%2e%2e/{}", "/swagger-ui/..%2f{}", "/swagger-ui/{}", "/swagger-ui/swagger-ui.css/../../{}"),
    *("/swagger-ui//../{}", "/swagger-ui/..%5c{}", "/swagger-ui/.%2e/{}", "/%252e%252e/{}", "http://127.0.0.1/health/../{}"),
    *(f"{PREFIX}/{{}}", f"{PREFIX}//{{}}", f"{PREFIX}/health/../{{}}", f"{PREFIX}/../{{}}", f"{PREFIX}{PREFIX}/{{}}", f"/x{PREFIX}/{{}}"),
    *(f"{PREFIX}/%2e%2e/{{}}", f"{PREFIX}/swagger-ui/../{{}}", f"/health{PREFIX}/{{}}", f"/swagger-ui{PREFIX}/../{{}}"),
)  # fmt: skip


@pytest.fixture(scope="module")
def keyed() -> Iterator[RunningServer]:
    with running_server(fake_config(api_keys=("right", "other"), root_path=PREFIX, allow_terminate_by_client=True)) as server:
        yield server


def status_of(server: RunningServer, method: str, path: str) -> int:
    """Without a client that tidies the path."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    try:
        connection.request(method, path)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize("path", PROTECTED)
def test_no_spelling_of_a_protected_path_is_open(keyed: RunningServer, path: str) -> None:
    for method in ("GET", "HEAD", "POST"):
        for spelling in SPELLINGS:
            target = spelling.format(path.removeprefix("/"))
            assert status_of(keyed, method, target) == 401, (method, target)


def test_health_docs_and_their_files_need_no_key_in_exactly_one_spelling(keyed: RunningServer) -> None:
    for path in OPEN:
        for target in (path, f"{PREFIX}{path}", f"{path}?x=/../v1/models"):
            assert status_of(keyed, "GET", target) == 200, target
    for path in (*(f"/{path}" for path in OPEN), *(f"{path}/" for path in OPEN[2:]), "/health/", "/HEALTH", "/swagger-ui", "/swagger-ui/"):
        assert status_of(keyed, "GET", path) == 401, path


def test_what_is_switched_off_is_not_open_either() -> None:
    with running_server(fake_config(api_keys=("right",), enable_docs=False, enable_ui=False)) as server:
        for path in ("/", "/openapi.json", "/ui", "/swagger-ui/start.js"):
            assert requests.get(server.url + path, timeout=10).status_code == 401, path
        assert requests.get(f"{server.url}/health", timeout=10).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer right"}, 200),
        ({"Authorization": "bEARER   other "}, 200),
        ({"x-api-key": "right"}, 200),
        ({"X-API-Key": "other "}, 200),
        ({"x-api-key": "right", "Authorization": "Bearer wrong"}, 200),
        ({"x-api-key": "wrong", "Authorization": "Bearer right"}, 200),
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "right"}, 401),
        ({"Authorization": "Basic right"}, 401),
        ({"Authorization": "Bearer right, Bearer other"}, 401),
        ({"Authorization": "Bearer RIGHT"}, 401),
        ({"Authorization": "Bearer right\xff"}, 401),
        ({"x-api-key": "Bearer right"}, 401),
        ({"x-api-key": ""}, 401),
        ({"api-key": "right"}, 401),
        ({"Cookie": "api_key=right"}, 401),
    ],
)
def test_a_key_comes_under_two_headers_and_no_others(keyed: RunningServer, headers: dict[str, str], status: int) -> None:
    response = requests.get(f"{keyed.url}/v1/models", headers=headers, timeout=10)

    assert response.status_code == status
    if status == 401:
        assert (response.json()["error"]["code"], response.headers["www-authenticate"]) == ("invalid_api_key", "Bearer")


def test_a_key_in_the_query_or_the_body_opens_nothing(keyed: RunningServer) -> None:
    for query in ("api_key=right", "key=right", "access_token=right", "Authorization=Bearer%20right", "x-api-key=right"):
        assert requests.get(f"{keyed.url}/v1/models?{query}", timeout=10).status_code == 401, query
    assert requests.post(f"{keyed.url}/tokenize", json={"prompt": "x", "api_key": "right"}, timeout=10).status_code == 401


def test_a_key_that_nobody_asked_for_is_welcome_under_both_headers(server: RunningServer) -> None:
    for headers in ({"Authorization": "Bearer YOUR_API_KEY"}, {"x-api-key": "YOUR_API_KEY"}):
        assert requests.get(f"{server.url}/v1/models", headers=headers, timeout=10).status_code == 200


def test_options_reaches_no_route(keyed: RunningServer) -> None:
    for path in PROTECTED:
        assert requests.options(keyed.url + path, timeout=10).status_code in (404, 405), path


class Recorder:
    """An app that notes what reaches it."""

    def __init__(self) -> None:
        self.reached: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.reached.append(scope["type"])


async def test_a_websocket_is_refused_and_the_lifespan_is_let_through() -> None:
    app, sent = Recorder(), list[Message]()

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError

    gate = RequireApiKey(app, keys=ring("right"), open_paths={"/health"})
    await gate({"type": "websocket", "path": "/health", "headers": []}, receive, send)
    await gate({"type": "lifespan"}, receive, send)

    assert app.reached == ["lifespan"]
    assert sent == [{"type": "websocket.close", "code": 1008}]


def ring(*words: str, file: Path | None = None, clock: FakeClock | None = None) -> KeyRing:
    files = [str(file)] if file else []
    return KeyRing(lambda: load_keys(words, files), new_quota=lambda key: Quota(key.limits, owner=key.name, clock_ns=clock or FakeClock()))


def test_every_key_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ring("a", "b", "c")
    compared: list[tuple[bytes, bytes]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return left == right

    monkeypatch.setattr("vlm_server.auth.hmac.compare_digest", compare)
    names = [holder.key.name if holder else None for holder in (keys.find([word]) for word in ("a", "c", "no", ""))]

    assert names == ["key-1", "key-3", None, None]
    assert len(compared) == 4 * 3
    assert {len(side) for pair in compared for side in pair} == {32}


def write(file: Path, **keys: tuple[str, int]) -> None:
    file.write_text("".join(f'[[keys]]\nname = "{name}"\nkey = "{key}"\nrequests_per_minute = {n}\n' for name, (key, n) in keys.items()))


async def test_keys_are_read_again_and_those_that_stay_keep_what_they_used(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    write(file, alice=("a", 10), bob=("b", 10))
    keys = ring("plain", file=file)
    for name in ("a", "b"):
        keys.find([name]).quota.take(REQUESTS, 7)  # type: ignore[union-attr]
    write(file, alice=("new", 10), bob=("b", 5), carol=("c", 9))

    await keys.reload()

    assert keys.find(["a"]) is None
    remaining = {word: keys.find([word]).quota.standings()[REQUESTS].remaining for word in ("new", "b", "c")}  # type: ignore[union-attr]
    assert remaining == {"new": 3, "b": 3, "c": 9}
    assert keys.find(["plain"]) is not None


@pytest.mark.parametrize("text", ["", "x", '[[keys]]\nname = "alice"', None])
async def test_a_file_that_turned_wrong_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str | None) -> None:
    file = tmp_path / "keys.toml"
    write(file, alice=("hush", 10))
    keys = ring(file=file)
    if text is None:
        file.unlink()
    else:
        file.write_text(text)

    with caplog.at_level(logging.ERROR):
        await keys.reload()

    assert keys.find(["hush"]) is not None
    assert "the API keys stay as they were" in caplog.text
    assert str(file) in caplog.text
    assert "hush" not in caplog.text


def test_keys_that_can_be_guessed_are_named_in_one_warning_and_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys.toml"
    write(file, alice=("fifteen-letters", 10), bob=("sixteen--letters", 10))
    example = '[[keys]]\nname = "carol"\nkey_sha256 = "' + hashlib.sha256(b"replace-this-too").hexdigest() + '"\n'
    file.write_text(file.read_text() + example)

    keys = ring("hush", "x" * 16, file=file)

    [warning] = caplog.messages
    assert "3 API keys can be guessed" in warning
    assert "key-1, alice, carol;" in warning
    assert not any(key in warning for key in ("hush", "fifteen-letters", "replace-this"))
    assert keys.find(["hush"]) is not None


def test_good_keys_are_not_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "keys.toml", alice=("0123456789abcdef", 10))

    ring("f" * 32, file=tmp_path / "keys.toml")

    assert not caplog.messages


def test_a_ring_with_a_wrong_file_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ApiKeysError):
        ring(file=tmp_path / "none.toml")


def test_the_openapi_document_says_what_a_server_with_keys_asks_for_and_answers(keyed: RunningServer) -> None:
    document = requests.get(f"{keyed.url}/openapi.json", timeout=10).json()

    assert document["security"] == [{"ApiKey": []}]
    for path, method in (("/v1/models", "get"), ("/v1/chat/completions", "post")):
        assert {"401", "429"} <= set(document["paths"][path][method]["responses"])
    assert document["paths"]["/health"]["get"]["security"] == []


def test_the_config_shows_no_key() -> None:
    config: Any = fake_config(api_keys=("hush",))

    assert "hush" not in repr(config)
    assert "hush" not in repr(load_keys(["hush"], []))
