"""The chat page's files over HTTP: where they are, what their headers forbid, and what is open without a key."""

import http.client
import re
from pathlib import Path

import pytest
import requests

from tests.contract.running import RunningServer, fake_config, running_server
from vision.config import VisionConfig
from vlm_server.chat_page import FOLDER
from vlm_server.config import ServerConfig

FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file() and path.name != "index.html")
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}


def get(server: RunningServer, path: str, **headers: str) -> requests.Response:
    return requests.get(server.url + path, headers=headers, timeout=10)


def raw(server: RunningServer, path: str, method: str = "GET") -> tuple[int, bytes]:
    """Status and body, without a client that tidies the path."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def keyed() -> ServerConfig:
    return fake_config(api_keys=("secret",))


def test_the_page_and_all_it_names_are_there(server: RunningServer) -> None:
    page = get(server, "/ui")

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    addresses = re.findall(r'(?:src|href)="([^"#][^"]*)"', page.text)
    assert {"ui/app.js", "ui/style.css"} <= set(addresses)
    for address in addresses:
        assert get(server, f"/{address}").status_code == 200, address


@pytest.mark.parametrize("name", FILES)
def test_every_file_has_its_media_type_and_its_bytes(server: RunningServer, name: str) -> None:
    response = get(server, f"/ui/{name}")

    assert response.content == (FOLDER / name).read_bytes()
    assert response.headers["content-type"] == MEDIA_TYPES[Path(name).suffix]


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith((".js", ".mjs", ".css"))])
def test_every_module_that_a_module_imports_is_there_and_ours(name: str) -> None:
    text = (FOLDER / name).read_text()

    for address in re.findall(r'^(?:import|export)\b[^"\n]*from "([^"]+)"|^import "([^"]+)"', text, re.MULTILINE):
        target = next(filter(None, address))
        assert target.startswith("./"), target
        assert ((FOLDER / name).parent / target).is_file(), target
    if "vendor/" not in name:
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)


@pytest.mark.parametrize("path", ["/ui", "/ui/app.js", "/ui/style.css", "/ui/limits.json", "/ui/example.png"])
def test_nothing_from_elsewhere_may_run_or_be_loaded(server: RunningServer, path: str) -> None:
    headers = get(server, path).headers
    policy = dict(directive.partition(" ")[::2] for directive in headers["content-security-policy"].split("; "))

    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "'self' data: blob:"
    assert policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert not {"unsafe-inline", "unsafe-eval"} & set(re.findall(r"[\w-]+", headers["content-security-policy"]))
    assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")


def test_a_browser_asks_by_the_etag_and_head_has_the_headers_alone(server: RunningServer) -> None:
    first = get(server, "/ui/app.js")
    etag = first.headers["etag"]

    for tags in (etag, f'W/{etag}, "other"', f'"other", {etag}'):
        again = get(server, "/ui/app.js", **{"If-None-Match": tags})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert get(server, "/ui/app.js", **{"If-None-Match": '"other"'}).content == first.content
    assert first.headers["cache-control"] == "no-cache"
    for path in ("/ui", "/ui/app.js"):
        head = requests.head(server.url + path, timeout=10)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == get(server, path).headers["content-length"]
        assert requests.post(server.url + path, timeout=10).status_code == 405


def test_the_page_knows_the_servers_limits() -> None:
    config = fake_config(vision=VisionConfig(max_picture_bytes=1000, max_picture_pixels=2000), max_body_bytes=3000)
    with running_server(config) as server:
        assert get(server, "/ui/limits.json").json() == {"max_picture_bytes": 1000, "max_picture_pixels": 2000, "max_body_bytes": 3000}


def test_the_page_works_under_a_prefix_that_a_proxy_strips() -> None:
    with running_server(fake_config(root_path="/vlm")) as server:
        for prefix in ("", "/vlm"):
            assert get(server, f"{prefix}/ui").text == (FOLDER / "index.html").read_text()
            assert get(server, f"{prefix}/ui/app.js").status_code == 200
            slash = requests.get(f"{server.url}{prefix}/ui/", allow_redirects=False, timeout=10)
            assert (slash.status_code, slash.headers["location"]) == (308, "../ui")
            assert get(server, f"{prefix}/ui/").url == f"{server.url}{prefix}/ui"
    assert not re.search(r'(?:src|href)="/', (FOLDER / "index.html").read_text())


def test_without_a_key_exactly_the_pages_files_are_open() -> None:
    with running_server(keyed()) as server:
        for path in ("/ui", "/ui/", "/%75i", "/ui/limits.json", "/ui/example.png", *(f"/ui/{name}" for name in FILES)):
            assert raw(server, path)[0] in (200, 308), path
            assert raw(server, path, "HEAD")[0] in (200, 308), path


TRICKS = (
    *("/ui/../v1/models", "/ui/../metrics", "/ui/..", "/ui/../", "/ui/.", "/ui/./app.js", "/ui//app.js", "//ui", "//v1/models"),
    *("/ui/%2e%2e/v1/models", "/ui/%2E%2E%2Fv1%2Fmodels", "/ui%2f..%2fv1/models", "/ui/..%5cv1/models", "/ui\\..\\v1\\models"),
    *("/ui/%252e%252e/v1/models", "/ui;/../v1/models", "/ui/app.js/../../v1/models", "/ui/app.js/", "/ui/app.js%00", "/ui%00"),
    *("/ui/v1/models", "/ui//v1/models"),
    *("/UI", "/Ui/app.js", "/ui/APP.JS", "/uix", "/ui.html", "/ui/index.html", "/ui/nope", "/v1/models?/ui", "/v1/models/ui", "/v1/ui"),
    *("/ui/../chat_page.py", "/ui/../../config.py", "/ui/vendor", "/ui/vendor/", "/ui/vendor/../app.js", "/swagger-ui/../ui/../v1/models"),
)  # fmt: skip


@pytest.mark.parametrize("path", TRICKS)
def test_no_spelling_of_the_pages_path_opens_anything_else(path: str) -> None:
    with running_server(keyed()) as server:
        for method in ("GET", "HEAD", "POST"):
            status, body = raw(server, path, method)
            assert status == 401, (method, status)
            assert b"tiny-vlm" not in body


def test_other_methods_open_nothing(server: RunningServer) -> None:
    with running_server(keyed()) as closed:
        for method in ("POST", "PUT", "DELETE"):
            assert raw(closed, "/ui/app.js", method)[0] == 405


def test_the_page_can_be_switched_off_and_leaves_nothing_open() -> None:
    with running_server(fake_config(enable_ui=False)) as server:
        for path in ("/ui", "/ui/", "/ui/app.js"):
            assert get(server, path).status_code == 404
        assert "swagger-ui" in get(server, "/").text
    with running_server(fake_config(enable_ui=False, api_keys=("secret",))) as server:
        assert raw(server, "/ui")[0] == 401


def test_the_files_of_others_say_their_version_and_licence() -> None:
    notice = (FOLDER / "vendor" / "NOTICE.txt").read_text()

    for path in (FOLDER / "vendor").glob("*.mjs"):
        name, version = re.search(r"(markdown-it|DOMPurify) (\d+\.\d+\.\d+)", path.read_text()[:300]).groups()  # type: ignore[union-attr]
        assert f"{path.name} " in notice
        assert f"{name} {version}" in notice
