"""What LMDeploy's `APIClient` can be asked, as URLs and bodies: its methods, their parameters and defaults, however they are sent.

As there: what is passed as `**kwargs` travels as one field named `kwargs`, without effect. Knows nothing of connections.
"""

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

Messages = str | list[dict[str, Any]]
Items = TypeVar("Items", covariant=True)  # what a call that generates gives: an iterator, plain or asynchronous


class ApiCalls(ABC, Generic[Items]):
    """A server at `api_server_url`, e.g. http://localhost:23333."""

    def __init__(self, api_server_url: str, api_key: str | None = None) -> None:
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
        self._available_models: list[str] | None = None

    @abstractmethod
    def _post(self, url: str, body: dict[str, Any]) -> Items:
        """The response's object, or with `stream` in the body its events', as dicts; sent when the first one is asked for."""

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
    ) -> Items:
        """The response, or with `stream` its chunks, as dicts."""
        body = {name: value for name, value in locals().items() if name != "self"}
        return self._post(self.chat_completions_v1_url, body)

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
    ) -> Items:
        """The response, or with `stream` its chunks, as dicts."""
        body = {name: value for name, value in locals().items() if name != "self"}
        return self._post(self.completions_v1_url, body)

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
    ) -> Items:
        """The answer to one turn, or with `stream` its pieces, as dicts. With `interactive_mode` the server keeps the session."""
        body = {name: value for name, value in locals().items() if name != "self"}
        return self._post(self.chat_intractive_v1_url, body)
