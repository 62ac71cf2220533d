"""Prompts as completions repeat them before their answers: text, tokens, and where in the text each token begins.

Knows nothing of how answers are generated or written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.request import Prompt, TokenLogprobs
from vlm_server.backend import Tokenizer
from vlm_server.logprobs import completion_logprobs

_REPLACEMENT = "\ufffd"  # how a decoder shows bytes that are no character


@dataclass(frozen=True, slots=True)
class Echo:
    """One prompt. The text is the client's own; of token ids, what they decode to."""

    text: str
    token_ids: tuple[int, ...]

    def logprobs(self, scored: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, list[object]]:
        """`choices[].logprobs` of the prompt's tokens; the first has none, as nothing is before it. scored: all but the first."""
        first = TokenLogprobs(self.token_ids[0], 0.0, 0)
        written = completion_logprobs([first, *scored], tokenizer, offsets=_offsets(self, tokenizer))
        written["token_logprobs"][0] = written["top_logprobs"][0] = None
        return written


def echo_of(given: str | Sequence[int], prompt: Prompt, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> Echo:
    """What `given` looks like in front of an answer. Blocks while token ids are decoded; without the bytes of a character that they cut."""
    if isinstance(given, str):
        return Echo(given, prompt.token_ids)
    text = tokenizer.decode(given, skip_special_tokens=skip_special_tokens)
    return Echo(text.rstrip(_REPLACEMENT), prompt.token_ids)


def _offsets(echo: Echo, tokenizer: Tokenizer) -> list[int]:
    """Characters of the text before each token. Tokens that the text does not show, as one that begins every text, have no length.

    Follows the text byte by byte, since tokenizers put tokens or a space before it; where one changed the text, by the tokens' lengths.
    """
    text, place, num_characters = echo.text.encode(), 0, 0
    offsets = []
    for token_id in echo.token_ids:
        offsets.append(num_characters)
        end = min(len(text), place + _num_shown(text, place, token_id, tokenizer))
        num_characters += sum(_is_last_byte(text, index) for index in range(place, end))
        place = end
    return offsets


def _num_shown(text: bytes, place: int, token_id: int, tokenizer: Tokenizer) -> int:
    """Bytes of the text at `place` that are the token's."""
    data = tokenizer.token_bytes(token_id)
    if text.startswith(data, place):
        return len(data)
    if data.startswith(b" ") and text.startswith(data[1:], place):
        return len(data) - 1
    return len(data) if tokenizer.decode([token_id], skip_special_tokens=True) else 0


def _is_last_byte(text: bytes, index: int) -> bool:
    """Whether a character ends with this byte: the next one continues none."""
    return index + 1 == len(text) or text[index + 1] & 0xC0 != 0x80
