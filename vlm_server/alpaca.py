"""Chinese-LLaMA-Alpaca's demonstration server in facts: the prompts that it writes, its sampling defaults, the text that it returns.

Knows nothing of HTTP, of tokens or of how an answer is generated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

MODEL_NAME = "chinese-llama-alpaca"  # what its answers call their model, whatever that is
PORT = 19327

TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

_SHARED: dict[str, Any] = {"top_k": 40, "min_p": 0.0, "max_tokens": 128, "num_beams": 1, "repetition_penalty": 1.0, "do_sample": True}
CHAT_DEFAULTS: MappingProxyType[str, Any] = MappingProxyType({**_SHARED, "temperature": 0.7, "top_p": 1.0})
COMPLETION_DEFAULTS: MappingProxyType[str, Any] = MappingProxyType({**_SHARED, "temperature": 0.1, "top_p": 0.75})

_RESPONSE = "### Response:"
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation. Its role may be any text: the prompt leaves those out that it has no words for."""

    role: str
    text: str

    @property
    def is_known(self) -> bool:
        return self.role in _ROLES


def completion_prompt(instruction: str) -> str:
    """The prompt for one instruction. Its blank line holds four spaces, as the reference's does."""
    return f"{TASK}\n    \n### Instruction:\n{instruction}\n\n{_RESPONSE} "


def chat_prompt(turns: Sequence[Turn], *, task: str = TASK) -> str:
    """The prompt for a conversation. Its last system text, wherever that stands, takes the place of `task`; earlier ones are dropped."""
    tasks = [turn.text for turn in turns if turn.role == "system"]
    return "".join([f"{[task, *tasks][-1]}\n\n", *map(_written, turns), f"{_RESPONSE} "])


def answer_text(text: str) -> str:
    """What a whole answer is of all that the model wrote: the text behind the last response that it began, stripped."""
    return text.rpartition(_RESPONSE)[2].strip()


class StrippedStream:
    """Strips a text that comes in pieces: blanks at its beginning are dropped, others held back until something follows them."""

    def __init__(self) -> None:
        self._has_begun = False
        self._held = ""

    def feed(self, piece: str) -> str:
        """What of the text so far is sure to be no end."""
        text = self._held + piece
        if not self._has_begun:
            text = text.lstrip()
        ready = text.rstrip()
        self._held = text[len(ready) :]
        self._has_begun = self._has_begun or bool(ready)
        return ready


def _written(turn: Turn) -> str:
    match turn.role:
        case "user":
            return f"### Instruction:\n{turn.text}\n\n"
        case "assistant":
            return f"{_RESPONSE} {turn.text}\n\n"
        case _:
            return ""
