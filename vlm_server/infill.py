"""Prompts for text between a prefix and a suffix, in the format that the model's tokenizer has tokens for.

A tokenizer says how a model was trained to fill in, not whether it was: models that share a code model's vocabulary get its format.
Knows nothing of requests or of pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_server.backend import Tokenizer


@dataclass(frozen=True, slots=True)
class InfillFormat:
    """The marker before the prefix, the one between it and the suffix, the one that the middle follows; and what ends the middle."""

    prefix: str
    suffix: str
    middle: str
    ends: tuple[str, ...] = ()  # beside the model's end tokens and the markers

    @property
    def markers(self) -> tuple[str, str, str]:
        return self.prefix, self.suffix, self.middle


# All in the order prefix, suffix, middle, which each of these families was trained on, and which the prefix cache likes.
INFILL_FORMATS: dict[str, InfillFormat] = {
    # A base model goes on to the next file of its repository, or pads, where the middle is done.
    "qwen": InfillFormat(
        "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", ends=("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
    ),  # Qwen2.5-Coder and later; CodeGemma has the same words
    "starcoder": InfillFormat(
        "<fim_prefix>", "<fim_suffix>", "<fim_middle>", ends=("<|endoftext|>", "<fim_pad>", "<file_sep>")
    ),  # StarCoder, StarCoder2, Granite code models
    # The hole stands where the suffix begins; the third marker asks for what belongs into it.
    "deepseek": InfillFormat("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    # The middle ends with a token of its own, which is not among the model's end tokens.
    "codellama": InfillFormat("▁<PRE>", "▁<SUF>", "▁<MID>", ends=("▁<EOT>",)),
}


def infill_format(tokenizer: Tokenizer) -> InfillFormat | None:
    """The first format all of whose markers are whole tokens; None: the model cannot be asked to fill in."""
    formats = INFILL_FORMATS.values()
    return next((form for form in formats if all(tokenizer.added_token_id(marker) is not None for marker in form.markers)), None)


def infill_tokens(form: InfillFormat, prefix: str, suffix: str, tokenizer: Tokenizer) -> list[int]:
    """The prompt whose answer belongs between the two texts. Blocks while they are tokenized.

    The prefix begins a text, with the token and the space that a tokenizer puts there; the suffix stands in the middle of one.
    """
    before, between, after = (_id_of(marker, tokenizer) for marker in form.markers)
    first = tokenizer.encode("", add_special_tokens=True)
    return [*first, before, *tokenizer.encode(prefix), between, *tokenizer.encode_after(between, suffix), after]


def infill_end_ids(form: InfillFormat, tokenizer: Tokenizer) -> Sequence[int]:
    """The tokens that end the middle: those of them that the tokenizer has."""
    token_ids = (tokenizer.added_token_id(word) for word in (*form.markers, *form.ends))
    return [token_id for token_id in token_ids if token_id is not None]


def _id_of(marker: str, tokenizer: Tokenizer) -> int:
    token_id = tokenizer.added_token_id(marker)
    assert token_id is not None, f"the tokenizer has no {marker}"
    return token_id
