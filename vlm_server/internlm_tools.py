"""Tools, calls and results as plain messages, in the way that InternLM2 and 2.5 were trained on.

Their chat templates write roles and contents only; a tool's messages are told apart by a name behind the role. Knows nothing of templates.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

Message = dict[str, Any]

MARKER = "<|plugin|>"
BEGIN, END = f"<|action_start|>{MARKER}", "<|action_end|>"


def as_plain_messages(messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> list[Message]:
    """The same conversation for a template that knows no tools. The tools follow the system's messages."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    num_system = next((index for index, message in enumerate(messages) if message["role"] != "system"), len(messages))
    listed = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    return [*plain[:num_system], {"role": f"system name={MARKER}", "content": listed}, *plain[num_system:]]


def _plain(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": f"environment name={MARKER}", "content": message["content"]}
    if not message.get("tool_calls"):
        return message
    content, calls = message["content"], "".join(_written(message["tool_calls"]))
    return {
        "role": message["role"],
        "content": content + calls if isinstance(content, str) else [*content, {"type": "text", "text": calls}],
    }


def _written(calls: Sequence[dict[str, Any]]) -> Iterator[str]:
    for call in calls:
        function = {"name": call["function"]["name"], "parameters": call["function"]["arguments"]}
        yield f"{BEGIN}\n{json.dumps(function, ensure_ascii=False)}{END}"
