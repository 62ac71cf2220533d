"""Messages of Anthropic's API as messages of a chat, and which became which.

What the two APIs cut differently is put together here: a result of a tool is a message of its own, thinking and calls are fields of the
assistant's message, and neighbouring messages of one role are one turn. Checks nothing: that is done by `protocol`, and by the chat's own.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from vlm_server.anthropic.field_names import FieldNames
from vlm_server.anthropic.protocol import (
    Base64Source,
    CountTokensRequest,
    FileSource,
    ImageBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)

_ERROR = "Error: "  # in front of the result of a tool that failed


@dataclass(frozen=True, slots=True)
class _Piece:
    """One block with its path, and the role and path of the message that it is in."""

    role: str
    message_path: str
    block: Any
    path: str

    @property
    def turn(self) -> tuple[str, str]:
        """Equal for neighbours that belong into one message of the chat."""
        alone = {"tool": self.path, "system": self.message_path}
        return self.role, alone.get(self.role, "")


def chat_messages(request: CountTokensRequest, names: FieldNames) -> list[dict[str, Any]]:
    """The chat's messages; `names` is told where each part of them comes from."""
    messages: list[dict[str, Any]] = []
    for (role, _), group in groupby(_pieces(request), key=lambda piece: piece.turn):
        pieces, here = list(group), f"messages[{len(messages)}]"
        names[here] = pieces[0].message_path
        write = {"assistant": _assistant_message, "tool": _tool_message}.get(role)
        content = write(pieces, here, names) if write is not None else {"content": _content(pieces, here, names)}
        messages.append({"role": role, **content})
    return messages


def _pieces(request: CountTokensRequest) -> Iterator[_Piece]:
    if request.system:
        yield from (_Piece("system", "system", block, path) for block, path in _blocks(request.system, "system"))
    for index, message in enumerate(request.messages):
        path = f"messages[{index}]"
        for block, block_path in _blocks(message.content, f"{path}.content"):
            role = "tool" if isinstance(block, ToolResultBlock) else message.role
            yield _Piece(role, path, block, block_path)


def _blocks(content: str | Sequence[Any], path: str) -> Iterator[tuple[Any, str]]:
    """Each block with its path. A string is one text; an empty list is an empty one."""
    if isinstance(content, str) or not content:
        yield content or "", path
        return
    for index, block in enumerate(content):
        yield block, f"{path}[{index}]"


def _content(pieces: Sequence[_Piece], here: str, names: FieldNames) -> str | list[dict[str, Any]]:
    """Parts; a text alone is a string."""
    parts: list[dict[str, Any]] = []
    for piece in pieces:
        part = f"{here}.content[{len(parts)}]"
        names[part] = piece.path
        if isinstance(piece.block, ImageBlock):
            parts.append({"type": "image_url", "image_url": _image_url(piece, f"{part}.image_url", names)})
        else:
            parts.append({"type": "text", "text": _text(piece.block)})
    if [part["type"] for part in parts] != ["text"]:
        return parts
    names[f"{here}.content"] = pieces[0].path
    return str(parts[0]["text"])


def _image_url(piece: _Piece, here: str, names: FieldNames) -> dict[str, str]:
    match piece.block.source:
        case Base64Source() as source:
            field, leaf, value = "url", "data", f"data:{source.media_type};base64,{source.data}"
        case FileSource() as source:
            field, leaf, value = "file_id", "file_id", source.file_id
        case source:
            field, leaf, value = "url", "url", source.url
    for name in (here, f"{here}.url", f"{here}.file_id"):
        names[name] = f"{piece.path}.source.{leaf}"
    return {field: value}


def _assistant_message(pieces: Sequence[_Piece], here: str, names: FieldNames) -> dict[str, Any]:
    """Text of all its blocks in one, as the model wrote it, thinking and calls. Redacted thinking is left out."""
    texts = [piece for piece in pieces if isinstance(piece.block, TextBlock | str)]
    thoughts = [piece.block.thinking for piece in pieces if isinstance(piece.block, ThinkingBlock)]
    calls = [piece for piece in pieces if isinstance(piece.block, ToolUseBlock)]
    message: dict[str, Any] = {"content": "".join(_text(piece.block) for piece in texts) if texts or not calls else None}
    names[f"{here}.content"] = texts[0].path if texts else pieces[0].path
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        names[f"{here}.tool_calls"] = calls[0].path
        message["tool_calls"] = [_call(piece, f"{here}.tool_calls[{index}]", names) for index, piece in enumerate(calls)]
    return message


def _call(piece: _Piece, here: str, names: FieldNames) -> dict[str, Any]:
    block: ToolUseBlock = piece.block
    names[here] = names[f"{here}.function"] = piece.path
    names[f"{here}.function.arguments"] = f"{piece.path}.input"
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}}


def _tool_message(pieces: Sequence[_Piece], here: str, names: FieldNames) -> dict[str, Any]:
    """The one result; that of a tool that failed says so in its text."""
    [piece] = pieces
    block: ToolResultBlock = piece.block
    names[here] = piece.path
    names[f"{here}.tool_call_id"] = f"{piece.path}.tool_use_id"
    parts = [_Piece("tool", piece.path, part, path) for part, path in _blocks(block.content or "", f"{piece.path}.content")]
    if block.is_error:
        parts = _marked(parts, piece)
    return {"tool_call_id": block.tool_use_id, "content": _content(parts, here, names)}


def _marked(parts: Sequence[_Piece], result: _Piece) -> list[_Piece]:
    first = parts[0]
    if isinstance(first.block, ImageBlock):
        return [_Piece("tool", result.path, _ERROR, f"{result.path}.is_error"), *parts]
    return [_Piece("tool", result.path, _ERROR + _text(first.block), first.path), *parts[1:]]


def _text(block: TextBlock | str) -> str:
    return block if isinstance(block, str) else block.text
