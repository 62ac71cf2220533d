"""Log probabilities as the two OpenAI routes write them: decoded text and bytes, the sampled token in its place."""

from collections.abc import Sequence
from typing import Protocol

from engine.request import TokenLogprobs

_LOWEST = -9999.0  # what OpenAI writes for a probability of 0; JSON has no infinity


class TokenBytes(Protocol):
    def token_bytes(self, token_id: int) -> bytes: ...


def chat_logprobs(tokens: Sequence[TokenLogprobs], tokenizer: TokenBytes) -> dict[str, object]:
    """`choices[].logprobs` of a chat answer or chunk."""
    content = [
        _chat_entry(token.token_id, token.logprob, tokenizer)
        | {"top_logprobs": [_chat_entry(token_id, logprob, tokenizer) for token_id, logprob in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _chat_entry(token_id: int, logprob: float, tokenizer: TokenBytes) -> dict[str, object]:
    data = tokenizer.token_bytes(token_id)
    return {"token": data.decode("utf-8", "replace"), "bytes": list(data), "logprob": max(logprob, _LOWEST)}


def completion_logprobs(tokens: Sequence[TokenLogprobs], tokenizer: TokenBytes, *, offsets: Sequence[int]) -> dict[str, list[object]]:
    """`choices[].logprobs` of a completion or of a chunk. offsets: characters of the text before each token."""
    result: dict[str, list[object]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": list(offsets)}
    for token in tokens:
        data = tokenizer.token_bytes(token.token_id)
        result["tokens"].append(_completion_token(data))
        result["token_logprobs"].append(max(token.logprob, _LOWEST))
        best = {_completion_token(tokenizer.token_bytes(token_id)): max(logprob, _LOWEST) for token_id, logprob in token.top}
        result["top_logprobs"].append(best | {_completion_token(data): max(token.logprob, _LOWEST)})
    return result


def _completion_token(data: bytes) -> str:
    """Text, or for a part of a character OpenAI's `bytes:\\xe4\\xbd`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
