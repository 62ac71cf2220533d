"""The grammar of a chat's whole answer: reasoning first, then a fixed form, or calls of functions, in llguidance's notation.

A form alone says nothing of the reasoning before it, and nothing of calls in its place; here they come together. Knows nothing of HTTP
routes; which words are tokens of their own is told to it.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from engine.guided import GrammarError
from vlm_server.backend import GrammarReader
from vlm_server.errors import bad_request
from vlm_server.tools import AnswerPlan, CallStructure

TokenId = Callable[[str], int | None]

_ON_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as `guided.json_grammar`


async def check_calls(plan: AnswerPlan, token_id_of: TokenId, grammars: GrammarReader) -> None:
    """Refuses functions whose parameters no grammar can follow. Raises ApiError 400, or what `GrammarReader.read` raises."""
    grammar = answer_grammar(plan, None, token_id_of=token_id_of, in_reasoning=False)
    if grammar is None:
        return
    try:
        await grammars.read(lambda: grammar)
    except GrammarError as error:
        raise bad_request("invalid_value", f"tools: the parameters cannot be followed: {error}", param="tools") from error


def answer_grammar(plan: AnswerPlan, form: str | None, *, token_id_of: TokenId, in_reasoning: bool) -> str | None:
    """What the engine is to follow; None: anything.

    form: the grammar of an answer without calls, None for any text. in_reasoning: the prompt ends where the model thinks.
    """
    if plan.structure is None and (form is None or plan.reasoning is None):
        return form
    write = _Writer(plan.markers, token_id_of)
    rules = [] if plan.structure is None else _call_rules(plan.structure, write)
    if plan.structure is None:
        body = "@form"
    elif plan.structure.is_forced:
        body = "calls"
    elif form is not None:
        body = "@form | calls"
    else:
        rules += _free_rules(plan.structure, write)
        body = "free"
    before = ""
    if plan.reasoning is not None and body != "free":
        rules += _thought_rules(plan.reasoning.opening, plan.reasoning.closing, write)
        before = "thought blank" if in_reasoning else "(opened blank)?"
    grammars = [{"lark_grammar": "\n".join([f"start: {before} ({body})", *rules])}]
    if form is not None and "@form" in body:
        grammars.append(_named(form))
    return json.dumps({"grammars": grammars})


def _named(form: str) -> dict[str, Any]:
    """The grammar of a form as others refer to it. One that a client wrote is Lark's text, all others are JSON."""
    grammar = json.loads(form)["grammars"][0] if form.lstrip().startswith("{") else {"lark_grammar": form}
    return {**grammar, "name": "form"}


def _call_rules(structure: CallStructure, write: "_Writer") -> list[str]:
    repeated = "call" if structure.max_calls == 1 else f"call ({write.words(structure.separator)} call)*"
    rules = [
        f"calls: {write.words(structure.opening)} {repeated} {write.words(structure.closing)}",
        f"call: {' | '.join(f'call_{index}' for index in range(len(structure.tags)))}",
    ]
    for index, tag in enumerate(structure.tags):
        rules.append(f"call_{index}: {write.words(tag.begin)} arguments_{index} {write.words(tag.end)}")
        rules.append(f"arguments_{index}: %json " + json.dumps({**tag.schema, "x-guidance": _ON_ONE_LINE}))
    return rules


def _free_rules(structure: CallStructure, write: "_Writer") -> list[str]:
    """Any text, in which what begins as a call goes on as one."""
    start = structure.trigger(write.markers)
    assert start is not None, "a format whose calls cannot be told from text"
    if structure.opening:
        repeated = "call" if structure.max_calls == 1 else f"call ({write.words(structure.separator)} call)*"
        rest = f"{write.words(structure.opening.removeprefix(start))} {repeated} {write.words(structure.closing)}"
        rules = [f"block: lead {rest}"]
    else:
        rests = [
            f"{write.words(tag.begin.removeprefix(start))} arguments_{index} {write.words(tag.end)}"
            for index, tag in enumerate(structure.tags)
        ]
        rules = ["block: " + " | ".join(f"lead {rest}" for rest in rests)]
    return [f"free: {'block?' if structure.max_calls == 1 else 'block*'} ANY", *rules, write.until("lead", start), "ANY: /(?s:.*)/"]


def _thought_rules(opening: str, closing: str, write: "_Writer") -> list[str]:
    return [write.until("thought", closing), f"opened: {write.words(opening)} thought", r"blank: /\s*/"]


class _Writer:
    """Texts as strings, and those of the markers that are tokens as tokens."""

    def __init__(self, markers: Sequence[str], token_id_of: TokenId) -> None:
        self.markers = markers
        self._ids = {marker: token_id for marker in markers if (token_id := token_id_of(marker)) is not None}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._tokens = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None

    def words(self, text: str) -> str:
        pieces = self._tokens.split(text) if self._tokens is not None else [text]
        return " ".join(f"<[{self._ids[piece]}]>" if piece in self._ids else json.dumps(piece) for piece in pieces if piece)

    def until(self, name: str, marker: str) -> str:
        """A rule: any text up to the marker, which is its end."""
        lazy = "" if marker in self._ids else "[lazy]"
        return f"{name}{lazy}: /(?s:.*)/ {self.words(marker)}"
