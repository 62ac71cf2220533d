"""Which chat template a server uses: the model's own, a Jinja or a JSON file, or a built-in one by its name.

Knows nothing of how templates are rendered.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlm_server.built_in_templates import BUILT_IN, NOT_BUILT_IN, OWN
from vlm_server.chat_template import ChatTemplate, Message
from vlm_server.jinja_process import JinjaProcess
from vlm_server.role_template import RoleChatTemplate, RoleTemplate, parse_fields, parse_role_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptTemplate(Protocol):
    """Messages → the prompt's text."""

    @property
    def brings_special_tokens(self) -> bool: ...  # a first <s>, say, where the model wants one

    @property
    def stop_words(self) -> Sequence[str]: ...  # they end every answer

    @property
    def shows_tools(self) -> bool: ...  # whether the tools of a request come into the prompt

    @property
    def text(self) -> str: ...  # the template itself, where it is a program

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ) -> str: ...


def load_chat_template(
    model_folder: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    placeholder: str = "",
    picture_gap: str = "\n",
    chat_template: str | None = None,
    chat_template_args: str | None = None,
    meta_instruction: str | None = None,
    process: JinjaProcess | None = None,
) -> PromptTemplate:
    """The template that `chat_template` means; None is the processor's, else the tokenizer's.

    chat_template_args: a JSON object with words in place of a built-in's or a JSON file's. meta_instruction: the default system text.
    placeholder, picture_gap: what a template that knows no parts writes for a picture, and between it and its neighbours.

    Raises ValueError that names the flag, and TemplateError where a Jinja template never ends.
    """
    words, source = read_chosen(chat_template, chat_template_args, meta_instruction)
    if words is not None:
        return RoleChatTemplate(words, placeholder=placeholder, picture_gap=picture_gap)
    own = source or _processor_template(Path(model_folder)) or tokenizer.chat_template
    return ChatTemplate(
        tokenizer, own, placeholder=placeholder, picture_gap=picture_gap, meta_instruction=meta_instruction, process=process
    )


def read_chosen(
    chat_template: str | None, chat_template_args: str | None, meta_instruction: str | None
) -> tuple[RoleTemplate | None, str | None]:
    """The words that the three flags make, or Jinja's source; neither for the model's own. Raises ValueError that names the flag."""
    words: RoleTemplate | None = None
    source: str | None = None
    if chat_template in BUILT_IN:
        words = BUILT_IN[chat_template]
    elif chat_template not in (None, OWN):
        words, source = _read_file(chat_template)
    if words is not None:
        words = _with_arguments(words, chat_template_args, meta_instruction)
    elif chat_template_args is not None:
        raise ValueError("chat_template_args: a Jinja template has no words to replace, only a built-in template and a JSON file have")
    return words, source


def _read_file(name: str) -> tuple[RoleTemplate | None, str | None]:
    """Words or Jinja's source, by what the file holds."""
    if name in NOT_BUILT_IN:
        raise ValueError(f"chat_template: {name} is not built in: {NOT_BUILT_IN[name]}; {_allowed()}")
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"chat_template: {name} is neither a file nor built in; {_allowed()}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat_template: {name} cannot be read: {error}") from None
    if path.suffix.lower() != ".json" and not _is_json_object(text):
        return None, text
    return parse_role_template(text, BUILT_IN, where=f"chat_template: {name}"), None


def _allowed() -> str:
    return f"built in are {', '.join(BUILT_IN)}, and {OWN} for the model's own"


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _with_arguments(words: RoleTemplate, arguments: str | None, meta_instruction: str | None) -> RoleTemplate:
    given = {} if arguments is None else parse_fields(arguments, where="chat_template_args")
    if meta_instruction is not None:
        if given.get("meta_instruction", meta_instruction) != meta_instruction:
            raise ValueError("chat_template_args: meta_instruction differs from --meta-instruction; give one of the two")
        given["meta_instruction"] = meta_instruction
    return words.with_fields(given, where="chat_template_args")


def _processor_template(folder: Path) -> str | dict[str, str] | None:
    """In the order in which the reference looks for it."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        if (folder / name).is_file():
            template = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
            if isinstance(template, str | dict):
                return template
    return None
