"""What a chat in the terminal and one in the browser ask of a server: its models, an answer as it is written, a local picture as a URL.

Every failure is a ChatError of one line. Works with any server that speaks OpenAI's chat API; knows nothing of who types or reads.
"""

import base64
import json
import mimetypes
import ssl
import stat
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests

from vlm_server.client import events, json_loads

CONNECT_LIMIT_S = 10
ANSWER_LIMIT_S = 600  # for the next piece of an answer; before the first one a request may wait for its turn
MAX_PICTURE_BYTES = 20 << 20  # what `vlm-server serve` accepts unless told otherwise

_MAX_MESSAGE_CHARACTERS = 500
_MAX_LINE_BYTES = 1 << 20
_REMOTE = ("http://", "https://", "data:")

Message = dict[str, Any]


class ChatError(Exception):
    """The server, the connection or the picture; one line that says what to change."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split())[:_MAX_MESSAGE_CHARACTERS])


@dataclass(frozen=True, slots=True)
class Piece:
    """What one chunk added to an answer."""

    text: str = ""
    reasoning: str = ""  # what a model thinks before it answers, where the server tells it apart
    finish_reason: str | None = None


class ChatServer:
    """The server at `url`, with or without a /v1 at its end. Its calls block, and have a limit."""

    def __init__(self, url: str, api_key: str | None = None, *, ca_file: str | None = None) -> None:
        """ca_file: PEM file of the certificates that an https server may have. Raises ChatError where `url` is none, or the file."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ChatError(f"{url}: a server's URL is needed, such as http://127.0.0.1:23333; to run a model: vlm-server serve {url}")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._trusted = _trusted(ca_file)
        self._ca_file = ca_file
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def models(self) -> list[str]:
        """The ids of its models. Raises ChatError."""
        try:
            response = requests.get(f"{self.url}/v1/models", headers=self._headers, timeout=CONNECT_LIMIT_S, verify=self._ca_file)
            _raise_refusal(response)
            return [str(model["id"]) for model in response.json()["data"]]
        except requests.RequestException as error:
            raise _unreachable(self.url, error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ChatError(f"{self.url} does not answer as OpenAI's API: is it a chat server?") from error

    def chosen_model(self, name: str | None) -> str:
        """`name`, or the server's first model. Raises ChatError where there is no such model."""
        models = self.models()
        if not models:
            raise ChatError(f"{self.url} has no model")
        if name is not None and name not in models:
            raise ChatError(f"{self.url} has no model {name}, only {', '.join(models)}")
        return name or models[0]

    def answer(self, model: str, messages: Sequence[Message], **sampling: float | None) -> Generator[Piece, None, None]:
        """The answer's pieces as they are written. Closing the iterator closes the connection, which ends the answer. Raises ChatError."""
        body = _body(model, messages, sampling)
        limits = (CONNECT_LIMIT_S, ANSWER_LIMIT_S)
        try:
            with requests.post(
                f"{self.url}/v1/chat/completions", json=body, headers=self._headers, stream=True, timeout=limits, verify=self._ca_file
            ) as response:
                _raise_refusal(response)
                for event in events(response):
                    yield _piece(event)
        except requests.RequestException as error:
            raise _unreachable(self.url, error) from error

    async def answer_async(self, model: str, messages: Sequence[Message], **sampling: float | None) -> AsyncGenerator[Piece, None]:
        """As `answer`, for an event loop: cancelling it, too, closes the connection at once."""
        body = _body(model, messages, sampling)
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_LIMIT_S, sock_read=ANSWER_LIMIT_S)
        try:
            async with (
                aiohttp.ClientSession(timeout=limits, headers=self._headers, read_bufsize=_MAX_LINE_BYTES) as session,
                session.post(f"{self.url}/v1/chat/completions", json=body, ssl=self._trusted) as response,
            ):
                if not response.ok:
                    raise _refusal(await response.read(), response.status, response.reason)
                async for line in response.content:
                    data = line.removeprefix(b"data:").strip()
                    if data and data != b"[DONE]":
                        yield _piece(json_loads(data))
        except TimeoutError as error:
            raise ChatError(f"{self.url} did not answer in time") from error
        except aiohttp.ClientConnectorCertificateError as error:
            raise _untrusted(self.url) from error
        except aiohttp.ClientPayloadError as error:
            raise ChatError(f"{self.url} closed the connection in the middle of its answer") from error
        except (aiohttp.ClientError, ValueError) as error:  # ValueError: a line without end
            raise ChatError(f"{self.url} cannot be reached: {error}") from error


def user_message(parts: Sequence[Message]) -> Message:
    """Parts of text and pictures as one message; a lone text as a plain string, which every server understands."""
    if len(parts) == 1 and parts[0]["type"] == "text":
        return {"role": "user", "content": parts[0]["text"]}
    return {"role": "user", "content": list(parts)}


def text_part(text: str) -> Message:
    return {"type": "text", "text": text}


def picture_part(path_or_url: str) -> Message:
    """A URL as it is, a local file as a data: URL. Raises ChatError."""
    url = path_or_url if path_or_url.lower().startswith(_REMOTE) else _data_url(path_or_url)
    return {"type": "image_url", "image_url": {"url": url}}


def _data_url(name: str) -> str:
    path = Path(name).expanduser()
    media_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise ChatError(f"{name} is no file")
        if facts.st_size > MAX_PICTURE_BYTES:
            raise ChatError(f"{name} has {facts.st_size >> 20} MiB; a picture may have {MAX_PICTURE_BYTES >> 20}")
        if not facts.st_size:
            raise ChatError(f"{name} is empty")
        return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode()}"
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise ChatError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _piece(event: Any) -> Piece:
    if not isinstance(event, dict):
        return Piece()
    if event.get("error"):
        raise ChatError(_message(event) or "the server failed in the middle of its answer")
    choices = event.get("choices") or [{}]  # a last chunk may hold the usage alone
    delta = choices[0].get("delta") or {}
    return Piece(delta.get("content") or "", delta.get("reasoning_content") or "", choices[0].get("finish_reason"))


def _body(model: str, messages: Sequence[Message], sampling: Mapping[str, float | None]) -> dict[str, Any]:
    given = {name: value for name, value in sampling.items() if value is not None}
    return {"model": model, "messages": messages, "stream": True, **given}


def _raise_refusal(response: requests.Response) -> None:
    if not response.ok:
        raise _refusal(response.content, response.status_code, response.reason)


def _refusal(body: bytes, status: int, reason: str | None) -> ChatError:
    try:
        said = _message(json.loads(body))
    except ValueError:
        said = ""
    return ChatError(f"{said or reason or 'refused'} (HTTP {status})")


def _message(body: Any) -> str:
    """Of an error as OpenAI, LMDeploy or FastAPI write it."""
    if not isinstance(body, dict):
        return ""
    error = body.get("error")
    found = (error.get("message") if isinstance(error, dict) else error) or body.get("message") or body.get("detail")
    return str(found or "")


def _unreachable(url: str, error: requests.RequestException) -> ChatError:
    if isinstance(error, requests.Timeout):
        return ChatError(f"{url} did not answer in time")
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return ChatError(f"{url} closed the connection in the middle of its answer")
    if isinstance(error, requests.exceptions.SSLError):
        return _untrusted(url)
    if isinstance(error, requests.ConnectionError):
        return ChatError(f"{url} cannot be reached: is the server running?")
    return ChatError(f"{url}: {error}")


def _untrusted(url: str) -> ChatError:
    return ChatError(f"{url} has no certificate that is trusted for its name; --cafile names a file of those that are")


def _trusted(ca_file: str | None) -> ssl.SSLContext | bool:
    """For aiohttp: True are the system's."""
    if ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl.SSLError too: a file without certificates
        raise ChatError(f"{ca_file}: it is no file of trusted certificates: {error.strerror or error}") from error
