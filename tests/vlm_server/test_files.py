"""`/v1/files` over a scripted engine: what is taken, who has which file, for how long and how many."""

import contextlib
import errno
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.contract.fake_engine import FakeBackend
from tests.contract.running import RunningServer, fake_config, running_server, serving
from tests.vlm_server.files_client import PICTURE, UNKNOWN, Client, assert_refused
from vision.config import VisionConfig
from vlm_server.app import create_app
from vlm_server.response_schema import FileDeletedResponse, FileListResponse, FileResponse
from vlm_server.sessions.sqlite_store import SqliteStore
from vlm_server.sessions.store import RecordStore

LARGE = b"x" * (2 << 20)  # the parser of forms puts it into a temporary file


@contextlib.contextmanager
def keyed_server(**overrides: Any) -> Iterator[RunningServer]:
    with running_server(fake_config(api_keys=("a", "b"), **overrides)) as server:
        yield server


def test_an_upload_comes_back_bit_by_bit_until_it_is_deleted(client: Client) -> None:
    data = bytes(range(256)) * 5000

    file = FileResponse.model_validate(client.upload(data, purpose="user_data", name="photo ü.jpeg").json())
    content = client.send("GET", f"/v1/files/{file.id}/content")

    assert (file.bytes, file.filename, file.purpose, file.expires_at - file.created_at) == (len(data), "photo ü.jpeg", "user_data", 86400)
    assert FileResponse.model_validate(client.send("GET", f"/v1/files/{file.id}").json()) == file
    assert content.content == data
    assert content.headers["content-type"] == "application/octet-stream"
    assert FileDeletedResponse.model_validate(client.send("DELETE", f"/v1/files/{file.id}").json()).deleted
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        assert_refused(client.send(method, f"/v1/files/{file.id}{path}"), 404, "file_not_found", "file_id")


def test_the_list_is_sorted_searched_and_read_page_by_page(client: Client) -> None:
    ids = [client.uploaded(bytes([number]), purpose=("vision", "assistants")[number % 2]) for number in range(5)]

    first = FileListResponse.model_validate(client.send("GET", "/v1/files", params={"limit": 2, "order": "asc"}).json())
    rest = FileListResponse.model_validate(client.send("GET", "/v1/files", params={"after": ids[1], "order": "asc"}).json())

    assert client.ids() == ids[::-1]
    assert ([file.id for file in first.data], first.first_id, first.last_id, first.has_more) == (ids[:2], ids[0], ids[1], True)
    assert ([file.id for file in rest.data], rest.has_more) == (ids[2:], False)
    assert client.ids(purpose="assistants", order="asc") == [ids[1], ids[3]]
    assert client.ids(purpose="assistants", after=ids[3]) == [ids[1]]
    assert client.ids(purpose="batch") == []


def test_a_query_that_asks_for_nonsense_is_refused_or_warned_about(client: Client) -> None:
    for query in ({"limit": 0}, {"limit": 10_001}, {"order": "up"}, {"after": UNKNOWN}):
        [name] = query
        assert_refused(client.send("GET", "/v1/files", params=query), 400, "invalid_value", name)
    assert client.send("GET", "/v1/files", params={"mood": "x"}).json()["warnings"] == [
        "mood: no API documents this field; it has no effect"
    ]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"purpose": "batch"}, "invalid_value", "purpose"),
        ({"purpose": ["vision", "vision"]}, "invalid_value", "purpose"),
        ({"expires_after[seconds]": "5"}, "missing_required_parameter", "expires_after.anchor"),
        ({"expires_after[anchor]": "created_at"}, "missing_required_parameter", "expires_after.seconds"),
        ({"expires_after[anchor]": "now", "expires_after[seconds]": "5"}, "invalid_value", "expires_after.anchor"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "0"}, "invalid_value", "expires_after.seconds"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "2592001"}, "invalid_value", "expires_after.seconds"),
        ({"expires_after": "tomorrow"}, "invalid_value", "expires_after"),
        ({"name": "x" * 256}, "invalid_value", "file"),
        ({"data": b"a bad picture"}, "image_decode_failed", "file"),
    ],
)
def test_a_wrong_form_is_refused_by_the_name_of_its_field_and_leaves_nothing(
    client: Client, fields: dict[str, Any], code: str, param: str
) -> None:
    assert_refused(client.upload(**fields), 400, code, param)
    assert client.ids() == []


def test_a_form_without_its_parts_is_refused(client: Client) -> None:
    for options, code, param in (
        ({"files": {"file": ("a.png", PICTURE)}}, "missing_required_parameter", "purpose"),
        ({"files": {"purpose": (None, "vision")}}, "missing_required_parameter", "file"),
        ({"files": {"purpose": (None, "vision"), "file": (None, "text")}}, "invalid_value", "file"),
        ({"files": [("file", ("a", b"1")), ("file", ("b", b"2"))], "data": {"purpose": "vision"}}, "invalid_request", None),
        ({"files": {"file": ("a", b"1")}, "data": {"purpose": "v" * 5000}}, "invalid_request", None),
        ({"json": {"purpose": "vision"}}, "invalid_content_type", None),
        ({"data": b"x", "headers": {"Content-Type": "multipart/form-data"}}, "invalid_request", None),
        (
            {"data": b"--b\r\n" + b"X-A: 1\r\n" * 10_000, "headers": {"Content-Type": "multipart/form-data; boundary=b"}},
            "invalid_request",
            None,
        ),
        ({"data": b"no boundary", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}, "invalid_request", None),
    ):
        assert_refused(client.send("POST", "/v1/files", **options), 400, code, param)


@pytest.mark.parametrize("charset", ["unicode_escape", "utf-7", "base64", "nonsense"])
def test_a_form_in_a_strange_charset_is_answered(client: Client, charset: str) -> None:
    strange = b'--b\r\nContent-Disposition: form-data; name="file"; filename="\\ud800"\r\n\r\nx\r\n'
    strange += b'--b\r\nContent-Disposition: form-data; name="\\ud800"\r\n\r\nx\r\n--b--\r\n'

    response = client.send(
        "POST", "/v1/files", data=strange, headers={"Content-Type": f"multipart/form-data; boundary=b; charset={charset}"}
    )

    assert response.status_code == 400


def test_a_field_that_no_api_documents_is_warned_about_or_refused(client: Client) -> None:
    warnings = client.upload(mood="x", **{"expires_after[anchor]": "created_at", "expires_after[seconds]": 9, "expires_after[z]": 1}).json()
    with running_server(fake_config(strict_fields=True)) as strict:
        assert_refused(Client(strict).upload(mood="x"), 400, "unknown_parameter", "mood")

    assert [warning.split(":")[0] for warning in warnings["warnings"]] == ["mood", "expires_after.z"]


def test_a_file_over_the_limit_is_refused_before_it_is_read_whole() -> None:
    with running_server(fake_config(vision=VisionConfig(max_picture_bytes=1000))) as server:
        client = Client(server)

        assert_refused(client.upload(bytes(1001)), 400, "image_too_large", "file")
        assert client.upload(bytes(1000)).status_code == 200
        head = "POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        begun = '--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + "x" * 100_000
        for rest in (f"Content-Length: {10**7}\r\n\r\n", f"Transfer-Encoding: chunked\r\n\r\n{len(begun):x}\r\n{begun}"):
            assert "image_too_large" in answer_to(server, (head + rest).encode())


def answer_to(server: RunningServer, unfinished: bytes) -> str:
    """What the server says to a request whose end never comes."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(unfinished)
        answer = connection.recv(10_000)
        assert b" 400 " in answer.splitlines()[0]
        return (answer if b"image_too_large" in answer else answer + connection.recv(10_000)).decode()


def test_an_upload_that_the_client_cuts_off_leaves_nothing(client: Client, server: RunningServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    body = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvision\r\n'
    body += b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    head = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: %d\r\n\r\n"
    slow = body + b"a slow picture\r\n--b--\r\n"

    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head % 3_000_000 + body + bytes(2_000_000))
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head % len(slow) + slow)
        assert server.backend.activity.has_begun_within(5)

    assert server.backend.activity.was_left_within(5)
    assert client.ids() == []


def test_of_key_a_a_file_id_is_404_for_key_b() -> None:
    with keyed_server() as server:
        a, b = Client(server, "a"), Client(server, "b")
        file_id = a.uploaded()

        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            assert_refused(b.send(method, f"/v1/files/{file_id}{path}"), 404, "file_not_found", "file_id")
        assert_refused(b.chat({"file_id": file_id}), 404, "file_not_found", "messages[0].content[1].image_url.file_id")
        assert (a.ids(), b.ids()) == ([file_id], [])
        assert a.chat({"file_id": file_id}).status_code == 200
        assert Client(server, "c").upload().status_code == 401


class Clock:
    """Unix time that only the test moves."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


@contextlib.contextmanager
def server_with_clock(clock: Clock, **overrides: Any) -> Iterator[RunningServer]:
    @contextlib.asynccontextmanager
    async def open_store(where: str) -> AsyncIterator[RecordStore]:
        store = await SqliteStore.open(":memory:", clock=clock)
        yield store
        await store.close()

    backend = FakeBackend()
    with serving(create_app(fake_config(**overrides), open_backend=backend.open, open_store=open_store)) as url:
        yield RunningServer(url, "org/tiny-vlm", backend)


def test_a_file_is_gone_after_its_time() -> None:
    clock = Clock()
    with server_with_clock(clock, file_ttl_s=100.0, max_file_ttl_s=1000.0, max_files=3) as server:
        client = Client(server)
        lasting = {"expires_after[anchor]": "created_at", "expires_after[seconds]": 1000}
        short, usual, long = client.uploaded(**{**lasting, "expires_after[seconds]": 10}), client.uploaded(), client.uploaded(**lasting)
        assert client.upload().status_code == 413

        for elapsed_s, kept in ((9, [short, usual, long]), (11, [usual, long]), (101, [long]), (999, [long]), (1001, [])):
            clock.now_s = 1_000_000.0 + elapsed_s
            assert sorted(client.ids()) == sorted(kept)
            for file_id in (short, usual, long):
                status = 200 if file_id in kept else 404
                assert client.send("GET", f"/v1/files/{file_id}").status_code == status
                assert client.send("GET", f"/v1/files/{file_id}/content").status_code == status
                assert client.chat({"file_id": file_id}, max_tokens=1).status_code == status
        assert [client.upload().status_code for _ in range(4)] == [200, 200, 200, 413]


def test_what_is_over_a_keys_quota_is_refused_and_nothing_old_ends_for_it() -> None:
    with keyed_server(max_files=3, max_file_bytes_per_key=100) as server:
        a, b = Client(server, "a"), Client(server, "b")
        first = a.uploaded(bytes(60))

        refused = a.upload(bytes(41))
        second, third = a.uploaded(bytes(39)), a.uploaded(b"")

        assert_refused(refused, 413, "file_quota_exceeded", "file")
        assert "1 files with 60 bytes" in refused.json()["message"]
        assert_refused(a.upload(b""), 413, "file_quota_exceeded", "file")
        assert a.ids(order="asc") == [first, second, third]
        assert b.upload(bytes(100)).status_code == 200
        assert a.send("DELETE", f"/v1/files/{first}").status_code == 200
        assert a.upload(bytes(61)).status_code == 200


def test_uploads_at_once_never_exceed_the_quota() -> None:
    with running_server(fake_config(max_files=5)) as server, ThreadPoolExecutor(12) as threads:
        client = Client(server)

        statuses = list(threads.map(lambda number: client.upload(bytes([number])).status_code, range(24)))

        assert sorted(statuses) == [200] * 5 + [413] * 19
        assert len(client.ids()) == 5


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_large_upload_is_refused_while_the_temporary_folder_is_full(client: Client, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoRoom(tempfile.SpooledTemporaryFile[bytes]):
        def rollover(self) -> None:
            raise OSError(code, "no room", "/secret/path")

    with monkeypatch.context() as patched:
        patched.setattr("starlette.formparsers.SpooledTemporaryFile", NoRoom)
        refused, small = client.upload(LARGE), client.upload(b"small")

    assert_refused(refused, 507, "session_store_full", "file")
    assert refused.headers["Retry-After"] == "60"
    assert "/secret/path" not in refused.text
    assert small.status_code == 200
    assert client.upload(LARGE).status_code == 200


def test_a_large_upload_is_refused_while_there_is_no_temporary_folder(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))

    assert_refused(client.upload(LARGE), 507, "session_store_full", "file")


def test_files_outlive_their_server(tmp_path: Any) -> None:
    store = str(tmp_path / "sessions.sqlite3")
    with running_server(fake_config(session_store=store)) as server:
        file_id = Client(server).uploaded()

    with running_server(fake_config(session_store=store)) as server:
        assert Client(server).send("GET", f"/v1/files/{file_id}/content").content == PICTURE


def test_the_openapi_document_describes_the_form_and_the_bytes(server: RunningServer) -> None:
    paths = requests.get(f"{server.url}/openapi.json", timeout=10).json()["paths"]

    form = paths["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["file"]["format"] == "binary"
    assert set(form["properties"]) == {"file", "purpose", "expires_after[anchor]", "expires_after[seconds]"}
    assert {"200", "400", "413", "503"} <= set(paths["/v1/files"]["post"]["responses"])
    assert {parameter["name"] for parameter in paths["/v1/files"]["get"]["parameters"]} == {"limit", "order", "after", "purpose"}
    assert "404" in paths["/v1/files/{file_id}"]["delete"]["responses"]
    assert "application/octet-stream" in paths["/v1/files/{file_id}/content"]["get"]["responses"]["200"]["content"]
