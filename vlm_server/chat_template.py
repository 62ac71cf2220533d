"""Messages → the model's own prompt text, through its Jinja chat template.

Knows nothing of tokens, of pictures' contents or of HTTP, nor of how a template is kept from running away.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.request import InvalidRequestError
from vlm_server.jinja_process import JinjaProcess, RenderError, RenderLimitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

_PROBE = "probe"


class TemplateError(InvalidRequestError):
    """The chat template cannot write these messages, or there is none."""


class ChatTemplate:
    """One Jinja template. A picture in the messages is a part `{"type": "image"}`; in the text it is `placeholder`.

    source: None for a model without a template; then every `render` raises TemplateError.
    meta_instruction: the system text of conversations that bring none.
    process: where templates run; None: one of its own.

    Raises TemplateError where the template takes more time or memory than it is given.
    """

    brings_special_tokens = True
    stop_words: tuple[str, ...] = ()

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        source: str | dict[str, str] | None,
        *,
        placeholder: str = "",
        picture_gap: str = "\n",
        meta_instruction: str | None = None,
        process: JinjaProcess | None = None,
    ) -> None:
        self._special_tokens = {role: str(token) for role, token in tokenizer.special_tokens_map.items()}
        self._process = process or JinjaProcess()
        self._source = source
        self._placeholder = placeholder
        self._picture_gap = picture_gap
        self._meta_instruction = meta_instruction
        self._takes_parts = self._shows([{"type": "text", "text": _PROBE}])
        self._takes_strings = self._shows(_PROBE)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """The prompt's text, special tokens included.

        Raises TemplateError with the template's own complaint, e.g. about the order of roles.
        """
        source = self._choose(tools)
        prepared = [self._prepared(message, source) for message in self._with_system(messages)]
        try:
            return self._rendered(source, prepared, tools, add_generation_prompt, template_kwargs or {})
        except RenderLimitError as error:
            raise _stopped(error) from error
        except RenderError as error:
            raise TemplateError(f"messages: the model's chat template refuses them: {error}") from error

    def _rendered(
        self,
        source: str,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        template_kwargs: dict[str, Any],
    ) -> str:
        """As the reference's `apply_chat_template`: a key without a value is none, and the template sees the special tokens."""
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        variables = {**self._special_tokens, **template_kwargs}
        return self._process.render(source, given, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables)

    def _choose(self, tools: list[dict[str, Any]] | None) -> str:
        if self._source is None:
            raise TemplateError(
                "messages: this model has no chat template; start the server with --chat-template FILE or NAME, or use /v1/completions"
            )
        if isinstance(self._source, str):
            return self._source
        name = "tool_use" if tools and "tool_use" in self._source else "default"
        if name not in self._source:
            raise TemplateError(f"messages: the model has no default chat template, only {', '.join(sorted(self._source))}")
        return self._source[name]

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self._meta_instruction is None or any(message["role"] in ("system", "developer") for message in messages):
            return list(messages)
        return [{"role": "system", "content": self._meta_instruction}, *messages]

    def _prepared(self, message: Message, source: str) -> Message:
        prepared = {**message, "content": self._content(message.get("content"))}
        if message["role"] == "developer" and "developer" not in source:
            prepared["role"] = "system"
        if message.get("tool_calls"):
            prepared["tool_calls"] = [_with_parsed_arguments(call) for call in message["tool_calls"]]
        return prepared

    def _content(self, content: Any) -> str | list[dict[str, Any]]:
        """The form that the template can read: parts, or one string with the pictures' placeholders in their places."""
        if isinstance(content, list):
            if self._takes_parts:
                return content
            return content_text(content, placeholder=self._placeholder, picture_gap=self._picture_gap)
        text = "" if content is None else str(content)
        return text if self._takes_strings or not self._takes_parts else [{"type": "text", "text": text}]

    def _shows(self, content: str | list[dict[str, str]]) -> bool:
        """Whether the template writes the text of such a content, and no more of it than the text."""
        if self._source is None:
            return False
        try:
            text = self._rendered(self._choose(None), [{"role": "user", "content": content}], None, True, {})
        except RenderLimitError as error:
            raise _stopped(error) from error
        except (RenderError, TemplateError):
            return False
        return _PROBE in text and "'text'" not in text and '"text"' not in text


def content_text(parts: Sequence[dict[str, Any]], *, placeholder: str, picture_gap: str) -> str:
    """Parts as one string: texts on lines of their own, each picture as `placeholder`, with `picture_gap` between it and its neighbours."""
    text = ""
    for index, part in enumerate(parts):
        if index:
            text += "\n" if part["type"] == parts[index - 1]["type"] == "text" else picture_gap
        text += str(part["text"]) if part["type"] == "text" else placeholder
    return text


def _stopped(error: RenderLimitError) -> TemplateError:
    return TemplateError(f"messages: the model's chat template was stopped: {error}")


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Templates write arguments as an object; OpenAI's clients send them as its JSON text."""
    function = call.get("function") or {}
    try:
        arguments = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
