"""Messages → the model's own prompt text, through its Jinja chat template.

Knows nothing of tokens, of pictures' contents or of HTTP, nor of how a template is kept from running away.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.request import InvalidRequestError
from vlm_server import internlm_tools
from vlm_server.jinja_process import JinjaProcess, RendererLostError, RenderError, RenderLimitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

_PROBE = "probe"
_PROBE_TOOL = {
    "type": "function",
    "function": {"name": "probe_tool", "description": "", "parameters": {"type": "object", "properties": {}}},
}
_PROBE_CALL = {"id": "callprobe", "type": "function", "function": {"name": "probe_call", "arguments": {}}}
_PROBE_TURNS = (
    {"role": "user", "content": _PROBE},
    {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]},
    {"role": "tool", "tool_call_id": "callprobe", "content": "probe_result"},
    {"role": "assistant", "content": _PROBE},
    {"role": "user", "content": _PROBE},
)
_STRICT_ID = re.compile(r"[a-zA-Z0-9]{9}")  # of a call, as Mistral's templates want it


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
        self._as_internlm = False
        self._leaves_out: tuple[str, ...] = ()
        self.shows_tools = self._shows_tools()  # whether the tools of a request come into the prompt
        if not self.shows_tools and internlm_tools.MARKER in tokenizer.get_vocab():
            self._as_internlm = True
            self.shows_tools = self._shows_tools()
        self._leaves_out = self._left_out()

    @property
    def text(self) -> str:
        """The template's own text, or its variants' texts, and what is written around them; empty where there is none."""
        source = "\n".join(self._source.values()) if isinstance(self._source, dict) else self._source or ""
        return source + internlm_tools.BEGIN if source and self._as_internlm else source

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """The prompt's text, special tokens included; with `continue_final_message` up to the last message's text.

        Arguments of earlier calls are objects, as templates expect. Raises TemplateError with the template's own complaint, e.g. about
        the order of roles, or RendererLostError.
        """
        source = self._choose(tools)
        self._refuse_what_is_left_out(messages)
        prepared = [self._prepared(message, source) for message in self._with_system(messages)]
        if self._as_internlm:
            prepared, tools = internlm_tools.as_plain_messages(prepared, tools), None
        try:
            return self._rendered(source, prepared, tools, add_generation_prompt, template_kwargs or {}, continues=continue_final_message)
        except RenderLimitError as error:
            raise _stopped(error) from error
        except RenderError as error:
            if continue_final_message and "continue_final_message" in str(error):  # the reference's complaint holds the whole prompt
                raise TemplateError("continue_final_message: the model's chat template changes the last message's text") from error
            raise TemplateError(f"messages: the model's chat template refuses them: {error}") from error

    def _rendered(
        self,
        source: str,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        template_kwargs: dict[str, Any],
        *,
        continues: bool = False,
    ) -> str:
        """As the reference's `apply_chat_template`: a key without a value is none, and the template sees the special tokens."""
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        variables = {**self._special_tokens, **template_kwargs}
        return self._process.render(
            source,
            given,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continues,
            variables=variables,
        )

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
        if message["role"] == "tool" and self._takes_strings and _is_text(message.get("content")):
            prepared["content"] = "\n".join(part["text"] for part in message["content"])  # many know results as strings only
        if "[TOOL_CALLS]" in source:
            return _with_strict_ids(prepared)
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
        except (RenderLimitError, RendererLostError) as error:
            raise _stopped(error) from error
        except (RenderError, TemplateError):
            return False
        return _PROBE in text and "'text'" not in text and '"text"' not in text

    def _refuse_what_is_left_out(self, messages: Sequence[Message]) -> None:
        for number, message in enumerate(messages):
            for field in self._leaves_out:
                if message.get(field):
                    raise TemplateError(
                        f"messages[{number}].{field}: the model's chat template writes none; start with --chat-template FILE"
                    )

    def _left_out(self) -> tuple[str, ...]:
        """Of an earlier call and its result, by the field that tells of it, what the template drops without a word."""
        try:
            text = self.render(_PROBE_TURNS, tools=[_PROBE_TOOL] if self.shows_tools else None)
        except TemplateError:
            return ()
        shown = {"tool_calls": "probe_call" in text, "tool_call_id": "probe_result" in text}
        return tuple(field for field, is_shown in shown.items() if not is_shown)

    def _shows_tools(self) -> bool:
        if self._source is None:
            return False
        try:
            return "probe_tool" in self.render([{"role": "user", "content": _PROBE}], tools=[_PROBE_TOOL])
        except TemplateError:
            return False


def content_text(parts: Sequence[dict[str, Any]], *, placeholder: str, picture_gap: str) -> str:
    """Parts as one string: texts on lines of their own, each picture as `placeholder`, with `picture_gap` between it and its neighbours."""
    text = ""
    for index, part in enumerate(parts):
        if index:
            text += "\n" if part["type"] == parts[index - 1]["type"] == "text" else picture_gap
        text += str(part["text"]) if part["type"] == "text" else placeholder
    return text


def _stopped(error: Exception) -> TemplateError:
    return TemplateError(f"messages: the model's chat template was stopped: {error}")


def _is_text(content: object) -> bool:
    """Whether a content is a list of texts alone."""
    return isinstance(content, list) and all(part["type"] == "text" for part in content)


def _with_strict_ids(message: Message) -> Message:
    """Mistral's templates refuse every id of a call that is not of nine letters and digits."""
    strict = dict(message)
    if message.get("tool_calls"):
        strict["tool_calls"] = [{**call, "id": _strict_id(call["id"])} for call in message["tool_calls"]]
    if message.get("tool_call_id"):
        strict["tool_call_id"] = _strict_id(message["tool_call_id"])
    return strict


def _strict_id(call_id: str) -> str:
    return call_id if _STRICT_ID.fullmatch(call_id) else hashlib.sha256(call_id.encode()).hexdigest()[:9]
