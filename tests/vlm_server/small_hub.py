"""A model hub on loopback: the few calls that huggingface_hub's snapshot download makes, for those who bring the token."""

import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class SmallHub:
    """Repositories by id, each a dict of files; `paths` records what was asked for."""

    token: str
    repositories: dict[str, dict[str, bytes]]
    url: str = ""
    paths: list[str] = field(default_factory=list)


@contextmanager
def small_hub(repositories: dict[str, dict[str, bytes]], *, token: str) -> Iterator[SmallHub]:
    hub = SmallHub(token, repositories)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: SmallHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.paths.append(path)
        if self.headers.get("authorization") != f"Bearer {self.hub.token}":
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return
        for name, files in self.hub.repositories.items():
            if path.startswith(f"/api/models/{name}"):
                self._api(name, files, path.removeprefix(f"/api/models/{name}"))
                return
            if path.startswith(f"/{name}/resolve/"):
                self._file(files, path.removeprefix(f"/{name}/resolve/").partition("/"))
                return
        self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _api(self, name: str, files: dict[str, bytes], rest: str) -> None:
        revision = rest.removeprefix("/revision/").removeprefix("/tree/")
        if revision not in ("", "main", "v2", COMMIT):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif rest.startswith("/tree/"):
            entries = [{"type": "file", "path": path, "size": len(data), "oid": _oid(data)} for path, data in files.items()]
            self._send(200, json.dumps(entries).encode())
        else:
            siblings = [{"rfilename": path} for path in files]
            self._send(200, json.dumps({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}).encode())

    def _file(self, files: dict[str, bytes], parts: tuple[str, str, str]) -> None:
        data = files.get(parts[2])
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self._send(200, data, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
