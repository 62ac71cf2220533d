"""Chat templates without a program: words around each role's turn, as LMDeploy's JSON files hold them. Reads, checks and writes them.

The words of a conversation: system text eosys, then for each turn user text eoh, assistant text eoa separator. A system text that the
conversation does not bring is `meta_instruction`. Knows nothing of Jinja, of tokens or of which template a server uses.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from vlm_server.chat_template import Message, TemplateError, content_text

CAPABILITIES = ("chat", "completion", "infilling", "python")

_HOLE = "<FILL>"  # in the text of a request to a template that fills in: where the answer belongs
_INFILLING = "<PRE> {before} <SUF>{after} <MID>"  # Code Llama's words
_INFILLING_STOP = ("<EOT>",)
_NAMING = ("model_name", "model_path")  # fields of a file that are no words


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleTemplate:
    """The words. `meta_instruction` None: a conversation without a system text has none."""

    system: str = ""
    meta_instruction: str | None = None
    eosys: str = ""
    user: str = ""
    eoh: str = ""
    assistant: str = ""
    eoa: str = ""
    separator: str = ""
    tool: str = ""
    eotool: str = ""
    capability: str = "chat"  # chat; completion and python: the text as it is; infilling: the text around a hole
    stop_words: tuple[str, ...] = ()
    generation_prompt: str | None = None  # what the answer follows, where that is not `assistant`; no field of LMDeploy's

    def write(self, turns: Sequence[tuple[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The prompt for turns of (role, text). A last turn of the assistant is continued where an answer is asked for."""
        text = "" if self.meta_instruction is None or _brings_system(turns) else self.system + self.meta_instruction + self.eosys
        for role, words in turns:
            before, after = self._around(role)
            text += before + words + after
        if not add_generation_prompt:
            return text
        if turns and turns[-1][0] == "assistant":
            return text[: len(text) - len(self.eoa + self.separator)]
        return text + (self.assistant if self.generation_prompt is None else self.generation_prompt)

    def with_fields(self, given: Mapping[str, Any], *, where: str) -> "RoleTemplate":
        """These words, with those of `given` in their places; null is as good as absent. Raises ValueError that names the field."""
        known = [field.name for field in fields(self)]
        for name, value in given.items():
            if name not in known:
                raise ValueError(f"{where}: {name} is no field of a chat template; known are {', '.join((*_NAMING, *known))}")
            _check(name, value, where)
        words: dict[str, Any] = {
            name: tuple(value) if name == "stop_words" else value for name, value in given.items() if value is not None
        }
        if "assistant" in words:  # other words before an answer than those that the prompt's end was made for
            words = {"generation_prompt": None, **words}
        template = replace(self, **words)
        if template.capability == "infilling" and not template.stop_words:
            template = replace(template, stop_words=_INFILLING_STOP)
        return template

    def _around(self, role: str) -> tuple[str, str]:
        return {
            "system": (self.system, self.eosys),
            "user": (self.user, self.eoh),
            "assistant": (self.assistant, self.eoa + self.separator),
            "tool": (self.tool, self.eotool),
        }[role]


class RoleChatTemplate:
    """Messages → text through a `RoleTemplate`.

    A picture in the messages is a part `{"type": "image"}`; in the text it is `placeholder`, with `picture_gap` around it.
    """

    brings_special_tokens = False  # the tokenizer adds its own
    shows_tools = False
    text = ""  # no program that could know variables, or markers of calls and reasoning

    def __init__(self, words: RoleTemplate, *, placeholder: str = "", picture_gap: str = "\n") -> None:
        self._words = words
        self._placeholder = placeholder
        self._picture_gap = picture_gap

    @property
    def stop_words(self) -> tuple[str, ...]:
        return self._words.stop_words

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """The prompt's text, without the tokenizer's own special tokens. Raises TemplateError for what there are no words for.

        A last message of the assistant is continued wherever an answer is asked for.
        """
        if template_kwargs:
            raise TemplateError("chat_template_kwargs: this server's chat template has no variables")
        if tools or any(message.get("tool_calls") for message in messages):
            raise TemplateError("tools: this server's chat template has no words for tools; a Jinja template has")
        turns = [(_role(message), self._text(message.get("content"))) for message in messages]
        if self._words.capability == "chat":
            return self._words.write(turns, add_generation_prompt=add_generation_prompt or continue_final_message)
        return _bare(turns, self._words.capability)

    def _text(self, content: Any) -> str:
        if isinstance(content, list):
            return content_text(content, placeholder=self._placeholder, picture_gap=self._picture_gap)
        return "" if content is None else str(content)


def parse_role_template(text: str, built_in: Mapping[str, RoleTemplate], *, where: str) -> RoleTemplate:
    """The words of a JSON file; those that it leaves out are empty, or a built-in template's where `model_name` is its name.

    Raises ValueError that names the field. `where`: what errors call the file.
    """
    given = parse_fields(text, where=where)
    model_name = given.pop("model_name", None)
    if model_name is not None and not isinstance(model_name, str):
        raise ValueError(f"{where}: model_name must be a string")
    if given.pop("model_path", None) is not None:
        raise ValueError(f"{where}: model_path is not supported; pass that model's Jinja template as the file")
    return built_in.get(model_name or "", RoleTemplate(meta_instruction="")).with_fields(given, where=where)


def parse_fields(text: str, *, where: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: this is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{where}: a JSON object is needed, not {type(given).__name__}")
    return given


def _check(name: str, value: object, where: str) -> None:
    if value is None:
        return
    if name == "stop_words":
        if not isinstance(value, list) or not all(isinstance(word, str) and word for word in value):
            raise ValueError(f"{where}: stop_words must be a list of strings that are not empty")
        words = value
    else:
        words = [value]
    if not all(isinstance(word, str) for word in words):
        raise ValueError(f"{where}: {name} must be a string")
    if not all(_is_unicode(word) for word in words):
        raise ValueError(f"{where}: {name} is not Unicode text: half of a surrogate pair")
    if name == "capability" and value not in CAPABILITIES:
        raise ValueError(f"{where}: capability must be one of {', '.join(CAPABILITIES)}, not {value}")


def _is_unicode(word: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in word)


def _role(message: Message) -> str:
    return "system" if message["role"] == "developer" else str(message["role"])


def _brings_system(turns: Sequence[tuple[str, str]]) -> bool:
    return any(role == "system" for role, _ in turns)


def _bare(turns: Sequence[tuple[str, str]], capability: str) -> str:
    """The one user's text, for models that continue a text and know no conversation."""
    if [role for role, _ in turns] != ["user"]:
        raise TemplateError(f"messages: this server's chat template (capability {capability}) takes one user message and no other")
    text = turns[0][1]
    if capability != "infilling":
        return text
    before, hole, after = text.partition(_HOLE)
    if not hole or _HOLE in after:
        raise TemplateError(f"messages: this server's chat template (capability infilling) takes a text with one {_HOLE} in it")
    return _INFILLING.format(before=before, after=after)
