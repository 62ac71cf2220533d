"""What a client of one API key asks of `/v1/files` and of the routes that take file ids."""

from dataclasses import dataclass
from typing import Any

import requests

from tests.contract.running import RunningServer
from vlm_server.response_schema import ErrorResponse

PICTURE = b"\x89PNG\r\n\x1a\n\0 a picture"
UNKNOWN = "file-" + "0" * 32


@dataclass
class Client:
    """One API key's view of a server."""

    server: RunningServer
    key: str = "none"

    def upload(self, data: bytes = PICTURE, *, purpose: str = "vision", name: str = "a.png", **fields: Any) -> requests.Response:
        return self.send("POST", "/v1/files", files={"file": (name, data)}, data={"purpose": purpose, **fields})

    def uploaded(self, data: bytes = PICTURE, **fields: Any) -> str:
        """The id."""
        response = self.upload(data, **fields)
        assert response.status_code == 200, response.text
        return str(response.json()["id"])

    def send(self, method: str, path: str, **options: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.key}", **options.pop("headers", {})}
        return requests.request(method, self.server.url + path, headers=headers, timeout=10, **options)

    def ids(self, **query: Any) -> list[str]:
        return [file["id"] for file in self.send("GET", "/v1/files", params=query).json()["data"]]

    def chat(self, image: Any, **fields: Any) -> requests.Response:
        messages = [{"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "image_url", "image_url": image}]}]
        return self.send("POST", "/v1/chat/completions", json={"model": self.server.model, "messages": messages, **fields})


def assert_refused(response: requests.Response, status: int, code: str, param: str | None) -> None:
    error = ErrorResponse.model_validate(response.json()).error
    assert (response.status_code, error.code, error.param) == (status, code, param), response.text
