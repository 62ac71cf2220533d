"""`APIClient`: a small client with the methods, defaults and generator behaviour of LMDeploy's, and `AsyncAPIClient`: it, on an event loop.

As there: methods that generate are generators, also without streaming (they yield once), and nothing is raised for an error status, the
error's body is yielded. Unlike there every wait has a limit.
"""

import json
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from typing import Any

import aiohttp
import requests

from vlm_server.api_calls import ApiCalls

logger = logging.getLogger(__name__)

Timeout = tuple[float, float] | float | None  # seconds: for the connection, and for each next piece of an answer; None: no limit

Verify = bool | str | None

TIMEOUT_S = (10.0, 600.0)  # before its first piece a request may wait for its turn
_MAX_LINE_BYTES = 1 << 22  # of one event; a whole logprobs list is far below


def json_loads(content: str | bytes) -> Any:
    """The decoded JSON; an empty string, and a line in the log, where it is none."""
    try:
        return json.loads(content)
    except ValueError:
        logger.warning("not JSON: %.200r", content)
        return ""


def get_model_list(
    api_url: str, headers: Mapping[str, str] | None = None, timeout: Timeout = TIMEOUT_S, verify: Verify = None
) -> list[str] | None:
    """The ids of `GET /v1/models` at `api_url`; None where the server refuses. timeout, verify: as of `APIClient`."""
    response = requests.get(api_url, headers=dict(headers or {}), timeout=timeout, verify=verify)
    return _model_ids(response.json()) if response.ok else None


class APIClient(ApiCalls[Iterator[Any]]):
    """A server at `api_server_url`, e.g. http://localhost:23333. Raises what `requests` raises, where there is no answer.

    verify: a PEM file of the certificates that an https server may have; None: those that `requests` trusts, or the file that
    REQUESTS_CA_BUNDLE in the environment names; False: any.
    """

    def __init__(
        self, api_server_url: str, api_key: str | None = None, timeout: Timeout = TIMEOUT_S, *, verify: Verify = None, **kwargs: object
    ) -> None:
        super().__init__(api_server_url, api_key)
        self.verify = verify
        self._timeout = timeout

    @property
    def available_models(self) -> list[str] | None:
        """The served models' names, asked for once; None where the server refuses."""
        if self._available_models is None:
            self._available_models = get_model_list(self.models_v1_url, self.headers, self._timeout, self.verify)
        return self._available_models

    def encode(self, input: str | list[str], do_preprocess: bool = False, add_bos: bool = True) -> tuple[Any, Any]:
        """Token ids and their number; of several texts a list of each. `do_preprocess`: of the chat that asks the text."""
        body = {"input": input, "do_preprocess": do_preprocess, "add_bos": add_bos}
        [answer] = self._post(self.encode_v1_url, body)
        return answer["input_ids"], answer["length"]

    def chat(
        self,
        prompt: str,
        session_id: int,
        image_url: str | list[str] | None = None,
        request_output_len: int = 512,
        stream: bool = False,
        top_p: float = 0.8,
        top_k: int = 40,
        temperature: float = 0.8,
        repetition_penalty: float = 1.0,
        ignore_eos: bool = False,
    ) -> Iterator[tuple[str, int, str | None]]:
        """A turn of a session that the server keeps: (text, tokens, finish reason), of the whole answer or of its pieces.

        What the server refuses is a text with the finish reason `error`.
        """
        fields = {name: value for name, value in locals().items() if name != "self"}
        assert session_id != -1, "a session needs a number of its own"
        for item in self._post(self.chat_intractive_v1_url, {**fields, "interactive_mode": True}):
            yield _turn_of(item)

    def end_session(self, session_id: int) -> None:
        """Ends a session, after its running turn."""
        for _ in self.chat_interactive_v1(prompt="", session_id=session_id, interactive_mode=False, request_output_len=0):
            pass

    def _post(self, url: str, body: dict[str, Any]) -> Iterator[Any]:
        streams = bool(body.get("stream"))
        response = requests.post(url, headers=self.headers, json=body, stream=streams, timeout=self._timeout, verify=self.verify)
        if not streams:
            yield json_loads(response.content)
            return
        with response:
            yield from events(response)


class AsyncAPIClient(ApiCalls[AsyncIterator[Any]]):
    """`APIClient` for an event loop: its generators are asynchronous, and what it returns is awaited, also `available_models`.

    Each call has a connection of its own, which is closed when its generator is: nothing is left to be closed by hand. Raises what
    `aiohttp` raises, where there is no answer, and OSError for a `verify` that cannot be read.
    """

    def __init__(
        self, api_server_url: str, api_key: str | None = None, timeout: Timeout = TIMEOUT_S, *, verify: Verify = None, **kwargs: object
    ) -> None:
        super().__init__(api_server_url, api_key)
        self._trusted = ssl.create_default_context(cafile=verify) if isinstance(verify, str) else verify is not False
        connect_s, read_s = timeout if isinstance(timeout, tuple) else (timeout, timeout)
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_s, sock_read=read_s)

    @property
    def available_models(self) -> Awaitable[list[str] | None]:
        """The served models' names, asked for once; None where the server refuses."""
        return self._models()

    async def encode(self, input: str | list[str], do_preprocess: bool = False, add_bos: bool = True) -> tuple[Any, Any]:
        """As `APIClient.encode`."""
        body = {"input": input, "do_preprocess": do_preprocess, "add_bos": add_bos}
        [answer] = [item async for item in self._post(self.encode_v1_url, body)]
        return answer["input_ids"], answer["length"]

    async def chat(
        self,
        prompt: str,
        session_id: int,
        image_url: str | list[str] | None = None,
        request_output_len: int = 512,
        stream: bool = False,
        top_p: float = 0.8,
        top_k: int = 40,
        temperature: float = 0.8,
        repetition_penalty: float = 1.0,
        ignore_eos: bool = False,
    ) -> AsyncIterator[tuple[str, int, str | None]]:
        """As `APIClient.chat`."""
        fields = {name: value for name, value in locals().items() if name != "self"}
        assert session_id != -1, "a session needs a number of its own"
        async for item in self._post(self.chat_intractive_v1_url, {**fields, "interactive_mode": True}):
            yield _turn_of(item)

    async def end_session(self, session_id: int) -> None:
        """Ends a session, after its running turn."""
        async for _ in self.chat_interactive_v1(prompt="", session_id=session_id, interactive_mode=False, request_output_len=0):
            pass

    async def _models(self) -> list[str] | None:
        if self._available_models is None:
            async with self._connection() as session, session.get(self.models_v1_url, ssl=self._trusted) as response:
                self._available_models = _model_ids(await response.json()) if response.ok else None
        return self._available_models

    async def _post(self, url: str, body: dict[str, Any]) -> AsyncIterator[Any]:
        async with self._connection() as session, session.post(url, json=body, ssl=self._trusted) as response:
            if not body.get("stream"):
                yield json_loads(await response.read())
                return
            async for line in response.content:
                data = _event_data(line)
                if data:
                    yield json_loads(data)

    def _connection(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(headers=self.headers, timeout=self._timeout, read_bufsize=_MAX_LINE_BYTES)


def events(response: requests.Response) -> Iterator[Any]:
    """The decoded lines of an event stream without its `[DONE]`; an error's body is one undecorated line."""
    for line in response.iter_lines(delimiter=b"\n"):
        data = _event_data(line)
        if data:
            yield json_loads(data)


def _event_data(line: bytes) -> bytes:
    """Empty for lines that carry nothing."""
    data = line.removeprefix(b"data:").strip()
    return b"" if data == b"[DONE]" else data


def _turn_of(item: dict[str, Any]) -> tuple[str, int, str | None]:
    if "error" in item:
        return item["error"]["message"], item.get("tokens", 0), "error"
    return item["text"], item["tokens"], item["finish_reason"]


def _model_ids(models: Mapping[str, Any]) -> list[str]:
    return [str(model["id"]) for model in models["data"]]
