"""The status page's files over HTTP: where they are, under which policy, and when they are not there."""

import re
from pathlib import Path

import pytest
import requests

from tests.contract.running import RunningServer, fake_config, running_server
from vlm_server.chat_page import FOLDER, STATUS_FOLDER

FILES = sorted(path.relative_to(STATUS_FOLDER).as_posix() for path in STATUS_FOLDER.rglob("*") if path.name != "index.html")


def get(server: RunningServer, path: str) -> requests.Response:
    return requests.get(server.url + path, timeout=10, allow_redirects=False)


def test_the_page_and_all_it_names_are_there(server: RunningServer) -> None:
    page = get(server, "/ui/status")

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.content == (STATUS_FOLDER / "index.html").read_bytes()
    addresses = set(re.findall(r'(?:src|href)="([^"#][^"]*)"', page.text)) - {"../ui"}
    assert {"status/app.js", "status/style.css", "base.css"} <= addresses
    for address in addresses:
        assert get(server, f"/ui/{address}").status_code == 200, address


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_served_under_the_chat_pages_policy(server: RunningServer, name: str) -> None:
    response = get(server, f"/ui/status/{name}")

    assert response.content == (STATUS_FOLDER / name).read_bytes()
    assert response.headers["content-security-policy"] == get(server, "/ui").headers["content-security-policy"]
    assert response.headers["content-type"].startswith(("text/javascript", "text/css"))


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_every_module_that_a_module_imports_is_there_and_ours(name: str) -> None:
    """`../` leads to the chat page's modules, as it does in the addresses."""
    text = (STATUS_FOLDER / name).read_text()

    for target in re.findall(r'^import\b[^"\n]*from "([^"]+)"', text, re.MULTILINE):
        folder = FOLDER if target.startswith("../") else STATUS_FOLDER
        assert re.match(r"\.\.?/", target), target
        assert (folder / Path(target).name).is_file(), target
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|innerHTML|setAttribute\(\"style\"", text)


def test_without_a_key_exactly_its_files_are_open_and_its_numbers_are_not() -> None:
    with running_server(fake_config(api_keys=("secret",))) as server:
        for path in ("/ui/status", "/ui/status/", *(f"/ui/status/{name}" for name in FILES)):
            assert get(server, path).status_code in (200, 308), path
        for path in ("/status", "/ui/status/index.html", "/ui/status/../../status", "/ui/status/nope", "/ui/Status"):
            assert get(server, path).status_code == 401, path


def test_the_page_works_under_a_prefix_that_a_proxy_strips() -> None:
    with running_server(fake_config(root_path="/vlm")) as server:
        for prefix in ("", "/vlm"):
            assert get(server, f"{prefix}/ui/status").status_code == 200
            slash = get(server, f"{prefix}/ui/status/")
            assert (slash.status_code, slash.headers["location"]) == (308, "../status")
    assert not re.search(r'(?:src|href)="/', (STATUS_FOLDER / "index.html").read_text())


@pytest.mark.parametrize("switch", ["enable_ui", "enable_metrics"])
def test_without_pages_or_without_numbers_there_is_no_status_page(switch: str) -> None:
    with running_server(fake_config(**{switch: False})) as server:
        for path in ("/ui/status", "/ui/status/", "/ui/status/app.js"):
            assert get(server, path).status_code == 404, path
        assert get(server, "/ui").status_code == (200 if switch == "enable_metrics" else 404)
