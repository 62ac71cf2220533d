"""A tokenizer of single bytes, with the odd longer token, for tests that need text without a model."""

from collections.abc import Collection, Sequence

BOS = 256
EOS = 257
IMAGE = 258
_PIECES = [" the", "你好", "好吗".encode()[1:], "🌍".encode()[:2], "🌍".encode()[2:], "STOP", "S", "TO"]
FIRST_PIECE = 259
VOCAB_SIZE = FIRST_PIECE + len(_PIECES)
SPECIAL = frozenset({BOS, EOS, IMAGE})


class ByteTokenizer:
    """Ids 0 to 255 are bytes, then come three special tokens, then pieces whose borders cut characters."""

    vocab_size = VOCAB_SIZE
    eos_token_ids = (EOS,)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [*([BOS] if add_special_tokens else []), *text.encode()]

    def encode_after(self, token_id: int, text: str) -> list[int]:
        return self.encode(text)

    def showing(self, words: Collection[str]) -> "ByteTokenizer":
        """None of the words is a special token here."""
        return self

    def added_token_id(self, token: str) -> int | None:
        """No marker is a token of its own."""
        return None

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        if token_id in SPECIAL:
            return {BOS: b"<s>", EOS: b"</s>", IMAGE: b"<image>"}[token_id]
        piece = _PIECES[token_id - FIRST_PIECE]
        return piece.encode() if isinstance(piece, str) else piece

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        kept = [token_id for token_id in token_ids if not (skip_special_tokens and token_id in SPECIAL)]
        return b"".join(self.token_bytes(token_id) for token_id in kept).decode("utf-8", "replace")
