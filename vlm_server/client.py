"""`APIClient`: a small synchronous client with the methods, defaults and generator behaviour of LMDeploy's.

As there: methods that generate are generators, also without streaming (they yield once); nothing is raised for an error status, the
error's body is yielded; there is no timeout; and what is passed as `**kwargs` travels as one field named `kwargs`, without effect.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import requests

logger = logging.getLogger(__name__)

Messages = str | list[dict[str, Any]]


def json_loads(content: str | bytes) -> Any:
    """The decoded JSON; an empty string, and a line in the log, where it is none."""
    try:
        return json.loads(content)
    except ValueError:
        logger.warning("not JSON: %.200r", content)
        return ""


def get_model_list(api_url: str, headers: Mapping[str, str] | None = None, verify: bool | str | None = None) -> list[str] | None:
    """The ids of `GET /v1/models` at `api_url`; None where the server refuses. verify: as of `APIClient`."""
    response = requests.get(api_url, headers=dict(headers or {}), timeout=None, verify=verify)
    if not response.ok:
        return None
    return [str(model["id"]) for model in response.json()["data"]]


class APIClient:
    """A server at `api_server_url`, e.g. http://localhost:23333.

    verify: a PEM file of the certificates that an https server may have; None: those that `requests` trusts, or the file that
    REQUESTS_CA_BUNDLE in the environment names; False: any.
    """

    def __init__(self, api_server_url: str, api_key: str | None = None, *, verify: bool | str | None = None, **kwargs: object) -> None:
        self.api_server_url = api_server_url
        self.models_v1_url = f"{api_server_url}/v1/models"
        self.chat_completions_v1_url = f"{api_server_url}/v1/chat/completions"
        self.completions_v1_url = f"{api_server_url}/v1/completions"
        self.chat_intractive_v1_url = f"{api_server_url}/v1/chat/interactive"  # as LMDeploy spells it
        self.encode_v1_url = f"{api_server_url}/v1/encode"
        self.api_key = api_key
        self.headers = {"content-type": "application/json"}
        if api_key is not None:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self.verify = verify
        self._available_models: list[str] | None = None

    @property
    def available_models(self) -> list[str] | None:
        """The served models' names, asked for once; None where the server refuses."""
        if self._available_models is None:
            self._available_models = get_model_list(self.models_v1_url, self.headers, self.verify)
        return self._available_models

    def encode(self, input: str | list[str], do_preprocess: bool = False, add_bos: bool = True) -> tuple[Any, Any]:
        """Token ids and their number; of several texts a list of each. `do_preprocess`: of the chat that asks the text."""
        body = {"input": input, "do_preprocess": do_preprocess, "add_bos": add_bos}
        answer = requests.post(self.encode_v1_url, headers=self.headers, json=body, timeout=None, verify=self.verify).json()
        return answer["input_ids"], answer["length"]

    def chat_completions_v1(
        self,
        model: str,
        messages: Messages,
        temperature: float | None = 0.7,
        top_p: float | None = 1.0,
        logprobs: bool | None = False,
        top_logprobs: int | None = 0,
        n: int | None = 1,
        max_completion_tokens: int | None = None,
        max_tokens: int | None = None,
        stop: str | list[str] | None = None,
        stream: bool | None = False,
        presence_penalty: float | None = 0.0,
        frequency_penalty: float | None = 0.0,
        user: str | None = None,
        repetition_penalty: float | None = 1.0,
        ignore_eos: bool | None = False,
        skip_special_tokens: bool | None = True,
        spaces_between_special_tokens: bool | None = True,
        top_k: int | None = 40,
        min_new_tokens: int | None = None,
        min_p: float | None = 0.0,
        logit_bias: dict[str, float] | None = None,
        stream_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """The response, or with `stream` its chunks, as dicts."""
        body = {name: value for name, value in locals().items() if name != "self"}
        yield from self._post(self.chat_completions_v1_url, body)

    def completions_v1(
        self,
        model: str,
        prompt: str | list[Any],
        suffix: str | None = None,
        temperature: float | None = 0.7,
        n: int | None = 1,
        max_completion_tokens: int | None = 16,
        max_tokens: int | None = 16,
        stream: bool | None = False,
        stop: str | list[str] | None = None,
        top_p: float | None = 1.0,
        top_k: int | None = 40,
        user: str | None = None,
        repetition_penalty: float | None = 1.0,
        ignore_eos: bool | None = False,
        skip_special_tokens: bool | None = True,
        spaces_between_special_tokens: bool | None = True,
        stream_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """The response, or with `stream` its chunks, as dicts."""
        body = {name: value for name, value in locals().items() if name != "self"}
        yield from self._post(self.completions_v1_url, body)

    def chat_interactive_v1(
        self,
        prompt: Messages,
        image_url: str | list[str] | None = None,
        session_id: int = -1,
        interactive_mode: bool = False,
        stream: bool = False,
        stop: str | list[str] | None = None,
        request_output_len: int | None = None,
        top_p: float = 0.8,
        top_k: int = 40,
        temperature: float = 0.8,
        repetition_penalty: float = 1.0,
        ignore_eos: bool = False,
        skip_special_tokens: bool | None = True,
        adapter_name: str | None = None,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """The answer to one turn, or with `stream` its pieces, as dicts. With `interactive_mode` the server keeps the session."""
        body = {name: value for name, value in locals().items() if name != "self"}
        yield from self._post(self.chat_intractive_v1_url, body)

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
        assert session_id != -1, "a session needs a number of its own"
        body = {name: value for name, value in locals().items() if name != "self"}
        for item in self._post(self.chat_intractive_v1_url, {**body, "interactive_mode": True}):
            if "error" in item:
                yield item["error"]["message"], item.get("tokens", 0), "error"
            else:
                yield item["text"], item["tokens"], item["finish_reason"]

    def end_session(self, session_id: int) -> None:
        """Ends a session, after its running turn."""
        for _ in self.chat_interactive_v1(prompt="", session_id=session_id, interactive_mode=False, request_output_len=0):
            pass

    def _post(self, url: str, body: dict[str, Any]) -> Iterator[Any]:
        response = requests.post(url, headers=self.headers, json=body, stream=bool(body["stream"]), timeout=None, verify=self.verify)
        if not body["stream"]:
            yield json_loads(response.content)
            return
        with response:
            yield from events(response)


def events(response: requests.Response) -> Iterator[Any]:
    """The decoded lines of an event stream without its `[DONE]`; an error's body is one undecorated line."""
    for line in response.iter_lines(delimiter=b"\n"):
        data = line.removeprefix(b"data:").strip()
        if data and data != b"[DONE]":
            yield json_loads(data)
