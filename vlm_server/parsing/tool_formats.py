"""The formats in which models write calls: how each is read, which of its words must be shown, and how a grammar would write a call.

One entry per format; a new one is a new entry. Names and aliases are those that the flags of LMDeploy, vLLM and SGLang have for them.
"""

from dataclasses import dataclass

from vlm_server.parsing.calls import CallReader, NotACall, ReadCalls
from vlm_server.parsing.scanner import Steps


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """One format. In `begin`, {name} stands for the function's name; between `begin` and `end` are the arguments."""

    read: ReadCalls
    markers: tuple[str, ...]  # what has to be in the text to be found, also where the tokenizer calls it special
    opening: str = ""  # before the first call
    begin: str
    end: str
    separator: str = ""  # between two calls
    closing: str = ""  # behind the last call

    def begin_of(self, name: str) -> str:
        return self.begin.replace("{name}", name)


# --- A JSON object between tags: Hermes and Qwen, InternLM ----------------------------------------------------------------------------


def _tagged(begin: str, end: str) -> ReadCalls:
    def read(reader: CallReader) -> Steps[None]:
        while (yield from reader.content_until(begin)):
            yield from reader.attempt(call(reader), ends=(end,))

    def call(reader: CallReader) -> Steps[None]:
        yield from reader.skip_space()
        yield from reader.call_object()
        yield from reader.skip_space()
        yield from reader.expect(end)

    return read


_HERMES = ToolFormat(
    read=_tagged("<tool_call>", "</tool_call>"),
    markers=("<tool_call>", "</tool_call>"),
    begin='<tool_call>\n{"name": "{name}", "arguments": ',
    end="}\n</tool_call>",
    separator="\n",
)
_INTERNLM = ToolFormat(
    read=_tagged("<|action_start|><|plugin|>", "<|action_end|>"),
    markers=("<|action_start|>", "<|plugin|>", "<|action_end|>"),
    begin='<|action_start|><|plugin|>\n{"name": "{name}", "parameters": ',
    end="}<|action_end|>",
    separator="\n",
)


# --- Llama 3: bare objects at the answer's beginning, or anywhere behind a tag --------------------------------------------------------

_PYTHON_TAG = "<|python_tag|>"


def _read_llama(reader: CallReader) -> Steps[None]:
    yield from reader.attempt(_llama_calls(reader))
    while (yield from reader.content_until(_PYTHON_TAG)):
        yield from reader.attempt(_llama_calls(reader))


def _llama_calls(reader: CallReader) -> Steps[None]:
    yield from reader.skip_space()
    if (yield from reader.sees(_PYTHON_TAG)):
        reader.accept(_PYTHON_TAG)
        yield from reader.skip_space()
    while True:
        yield from reader.call_object(first_keys=("name", "type"))  # another first key: an answer that is JSON, and is not held back
        yield from reader.skip_space()
        if not (yield from reader.sees(";")):
            return
        reader.accept(";")
        yield from reader.skip_space()


_LLAMA3 = ToolFormat(read=_read_llama, markers=(_PYTHON_TAG,), begin='{"name": "{name}", "parameters": ', end="}", separator="; ")


# --- Mistral: an array of objects behind one tag, or a tag, a name and arguments per call ---------------------------------------------

_TOOL_CALLS, _CALL_ID, _ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


def _read_mistral(reader: CallReader) -> Steps[None]:
    while (yield from reader.content_until(_TOOL_CALLS)):
        yield from reader.attempt(_mistral_calls(reader))


def _mistral_calls(reader: CallReader) -> Steps[None]:
    yield from reader.skip_space()
    yield from _named_arguments(reader) if (yield from reader.peek()) != "[" else _array_of_calls(reader)


def _named_arguments(reader: CallReader) -> Steps[None]:
    name = yield from reader.word()
    if (yield from reader.sees(_CALL_ID, _ARGS)) == _CALL_ID:
        reader.accept(_CALL_ID)
        yield from reader.word()
    if (yield from reader.sees(_ARGS)):
        reader.accept(_ARGS)
    yield from reader.skip_space()
    yield from reader.call(name)


def _array_of_calls(reader: CallReader) -> Steps[None]:
    yield from reader.expect("[")
    while True:
        yield from reader.skip_space()
        yield from reader.call_object()
        yield from reader.skip_space()
        if (yield from reader.expect(",", "]")) == "]":
            return


_MISTRAL = ToolFormat(
    read=_read_mistral,
    markers=(_TOOL_CALLS, _CALL_ID, _ARGS),
    opening="[TOOL_CALLS][",
    begin='{"name": "{name}", "arguments": ',
    end="}",
    separator=", ",
    closing="]",
)
_MISTRAL_ARGS = ToolFormat(read=_read_mistral, markers=_MISTRAL.markers, begin="[TOOL_CALLS]{name}[ARGS]", end="")


# --- DeepSeek: calls within a section, arguments fenced (V3, R1) or bare (V3.1) -------------------------------------------------------

_CALLS_BEGIN, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL_BEGIN, _SEP, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_FENCE = "```"


def _read_deepseek(reader: CallReader) -> Steps[None]:
    while (yield from reader.content_until(_CALLS_BEGIN)):
        yield from reader.attempt(_deepseek_calls(reader), ends=(_CALL_END, _CALLS_END))


def _deepseek_calls(reader: CallReader) -> Steps[None]:
    yield from reader.skip_space()
    yield from reader.expect(_CALL_BEGIN)
    while True:
        yield from _deepseek_call(reader)
        yield from reader.skip_space()
        if (yield from reader.expect(_CALL_BEGIN, _CALLS_END)) == _CALLS_END:
            return


def _deepseek_call(reader: CallReader) -> Steps[None]:
    """`function` SEP name, a line's end and the fenced arguments; or name SEP arguments."""
    word = yield from reader.word()
    yield from reader.expect(_SEP)
    if (yield from reader.peek()) == "{":
        yield from reader.call(word)
    else:
        yield from _fenced_call(reader)
    yield from reader.skip_space()
    yield from reader.expect(_CALL_END)
    reader.settle()


def _fenced_call(reader: CallReader) -> Steps[None]:
    name = yield from reader.word()
    if not name:
        raise NotACall
    yield from reader.skip_space()
    yield from reader.expect(_FENCE + "json")
    yield from reader.skip_space()
    yield from reader.call(name)
    yield from reader.skip_space()
    yield from reader.expect(_FENCE)
    reader.settle()


_DEEPSEEK_MARKERS = (_CALLS_BEGIN, _CALLS_END, _CALL_BEGIN, _CALL_END, _SEP)
_DEEPSEEK_V3 = ToolFormat(
    read=_read_deepseek,
    markers=_DEEPSEEK_MARKERS,
    opening=_CALLS_BEGIN,
    begin=f"{_CALL_BEGIN}function{_SEP}{{name}}\n{_FENCE}json\n",
    end=f"\n{_FENCE}{_CALL_END}",
    separator="\n",
    closing=_CALLS_END,
)
_DEEPSEEK_V31 = ToolFormat(
    read=_read_deepseek,
    markers=_DEEPSEEK_MARKERS,
    opening=_CALLS_BEGIN,
    begin=f"{_CALL_BEGIN}{{name}}{_SEP}",
    end=_CALL_END,
    closing=_CALLS_END,
)

# --- The table ------------------------------------------------------------------------------------------------------------------------

TOOL_FORMATS: dict[str, ToolFormat] = {
    "hermes": _HERMES,
    "llama3": _LLAMA3,
    "internlm": _INTERNLM,
    "mistral": _MISTRAL,
    "mistral-args": _MISTRAL_ARGS,
    "deepseek-v3": _DEEPSEEK_V3,
    "deepseek-v31": _DEEPSEEK_V31,
}
TOOL_ALIASES = {
    **dict.fromkeys(("qwen", "qwen25", "qwen2d5", "qwen3"), "hermes"),
    **dict.fromkeys(("llama3-json", "llama"), "llama3"),
    **dict.fromkeys(("internlm2", "intern-s1"), "internlm"),
    **dict.fromkeys(("deepseekv3", "deepseek-r1"), "deepseek-v3"),
    **dict.fromkeys(("deepseekv31", "deepseek-v3.1"), "deepseek-v31"),
}


def tool_format_of(template: str) -> str | None:
    """The name of the format that a chat template writes calls of earlier turns in."""
    if "<tool_call>" in template:
        return None if "<function=" in template or "<arg_key>" in template else "hermes"  # tags within tags instead of JSON
    if _CALLS_BEGIN in template:
        return "deepseek-v3" if _FENCE + "json" in template else "deepseek-v31"
    if _TOOL_CALLS in template:
        return "mistral-args" if _ARGS in template else "mistral"
    if "<|action_start|>" in template:
        return "internlm"
    return "llama3" if _PYTHON_TAG in template or ('"parameters": ' in template and "ipython" in template) else None
