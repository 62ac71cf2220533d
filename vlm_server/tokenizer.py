"""A checkpoint's tokenizer, from its folder or its GGUF file, without running code that the checkpoint brings.

Knows nothing of prompts or of HTTP.
InternLM2 and 2.5 name a tokenizer class of their own; here their sentencepiece model is read into the fast tokenizer instead.
"""

import vision  # noqa: F401  first: it makes torchvision, and so transformers, importable

# isort: split
import functools
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_REMOTE_SENTENCEPIECE = ("InternLM2Tokenizer", "InternLM2TokenizerFast", "InternLMTokenizer")
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


class TextTokenizer:
    """Text ↔ token ids, for many threads at once; `reference` is the reference library's own tokenizer."""

    def __init__(self, reference: PreTrainedTokenizerBase) -> None:
        self.reference = reference
        self._added: dict[int, bytes] = {token_id: token.content.encode() for token_id, token in reference.added_tokens_decoder.items()}
        backend = getattr(reference, "backend_tokenizer", None)
        self._bytes_of = _byte_alphabet() if backend is not None and "ByteLevel" in repr(backend.decoder) else None

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return list(self.reference(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def encode_after(self, token_id: int, text: str) -> list[int]:
        """The tokens of a text that stands behind `token_id`: as in the middle of a text, no space or first token is put before it."""
        before = self._added.get(token_id, b"").decode() or str(self.reference.eos_token or self.reference.bos_token or "")
        token_ids = self.encode(before + text)
        is_apart = bool(token_ids) and self.token_id(before) == token_ids[0]
        return token_ids[1:] if is_apart else self.encode(text)

    def spells(self, token_ids: Sequence[int], text: str) -> bool:
        """Whether the tokens are exactly the text, byte for byte."""
        return b"".join(self.token_bytes(token_id) for token_id in token_ids) == text.encode()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Differs from another tokenizer's: token ids that were kept under the same one still mean what they meant. Takes a moment once."""
        backend = getattr(self.reference, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else json.dumps(self.reference.get_vocab(), sort_keys=True)
        return hashlib.blake2b(rules.encode(), digest_size=16).hexdigest()

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text = self.reference.decode(list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def showing(self, words: Collection[str]) -> "ShowingDecoder":
        """Decodes as this tokenizer does, but shows those of the words that are special tokens also where these are skipped."""
        special = {token_id for token_id, token in self.reference.added_tokens_decoder.items() if token.special}
        return ShowingDecoder(self, special - {self.token_id(word) for word in words})

    def token_id(self, token: str) -> int | None:
        """The id of a whole token, None where the vocabulary has no such token."""
        token_id = self.reference.get_vocab().get(token)
        return None if token_id is None else int(token_id)

    def is_special(self, token_id: int) -> bool:
        """Whether it stands beside the text, as the ends of messages do."""
        return token_id in self.reference.all_special_ids

    def added_token_id(self, token: str) -> int | None:
        """The id of a token that is never cut, such as <|im_end|>; None where it is no such token."""
        return next((token_id for token_id, content in self._added.items() if content == token.encode()), None)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text; a part of a character, maybe. Empty for ids that the vocabulary only pads."""
        if token_id in self._added:
            return self._added[token_id]
        token = self.reference.convert_ids_to_tokens(token_id) if token_id < len(self.reference) else None
        if not isinstance(token, str):
            return b""
        if self._bytes_of is not None:
            return bytes(self._bytes_of[char] for char in token)
        if match := _BYTE_PIECE.fullmatch(token):
            return bytes.fromhex(match[1])
        return token.replace("▁", " ").encode()

    def vocabulary(self) -> str | None:
        """The tokenizer as the tokenizers library writes it, in JSON; None where it is of another library."""
        backend = getattr(self.reference, "backend_tokenizer", None)
        return None if backend is None else str(backend.to_str())


class ShowingDecoder:
    """Skips some special tokens and shows the others."""

    def __init__(self, tokenizer: TextTokenizer, skipped: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = frozenset(skipped)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        kept = [token_id for token_id in token_ids if token_id not in self._skipped] if skip_special_tokens else token_ids
        return self._tokenizer.decode(kept, skip_special_tokens=False)


def load_tokenizer(model_folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or in a `*.gguf` file. Blocks while files are read.

    Raises ValueError naming the folder where there is none that can be read.
    """
    path = Path(model_folder)
    if path.suffix == ".gguf":
        return _loaded(path.parent, gguf_file=path.name)
    config = _read_config(path)
    has_own_class = config.get("tokenizer_class") in _REMOTE_SENTENCEPIECE
    if has_own_class and not trust_remote_code and (path / "tokenizer.model").is_file():
        return _from_sentencepiece(path / "tokenizer.model", config)
    return _loaded(path, trust_remote_code=trust_remote_code)


def _byte_alphabet() -> dict[str, int]:
    """Byte-level vocabularies write bytes that cannot be shown as the characters from 256 on, in order."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    shown = {chr(byte): byte for byte in range(256) if chr(byte) in alphabet}
    hidden = (byte for byte in range(256) if chr(byte) not in alphabet)
    return shown | {chr(256 + number): byte for number, byte in enumerate(hidden)}


def _loaded(folder: Path, **options: Any) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no tokenizer that can be read: {error}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _from_sentencepiece(file: Path, config: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The fast tokenizer that cuts a text into the same pieces as the sentencepiece model does."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(file.read_bytes())
    special = {int(token_id): AddedToken(**fields) for token_id, fields in config.get("added_tokens_decoder", {}).items()}
    backend = _bpe(proto, special)
    _add_tokens(backend, proto, special)
    if config.get("add_bos_token", True):
        bos = config["bos_token"]
        backend.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, backend.token_to_id(bos))])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=config.get("model_max_length"),
        chat_template=config.get("chat_template"),
        clean_up_tokenization_spaces=False,
        additional_special_tokens=config.get("additional_special_tokens") or [],
        **{role: config[role] for role in _ROLES if config.get(role)},
    )


def _bpe(proto: Any, special: dict[int, AddedToken]) -> Tokenizer:
    """The pieces and their merges; a special token takes the place of the unused piece with its id."""
    names = [special[number].content if number in special else piece.piece for number, piece in enumerate(proto.pieces)]
    vocab = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab, list(_merges(proto)), unk_token=proto.trainer_spec.unk_piece, fuse_unk=True, byte_fallback=True))
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    decoding: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        spaces.insert(0, normalizers.Prepend("▁"))
        decoding.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(decoding)
    return backend


def _merges(proto: Any) -> Iterator[tuple[str, str]]:
    """Pairs in the order in which sentencepiece joins them: the best-scored result first."""
    normal = [piece for piece in proto.pieces if piece.type == piece.NORMAL]
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces) if piece.type in (piece.NORMAL, piece.USER_DEFINED)}
    for piece in sorted(normal, key=lambda piece: -piece.score):
        cuts = ((piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece)))
        yield from sorted((pair for pair in cuts if pair[0] in ids and pair[1] in ids), key=lambda pair: (ids[pair[0]], ids[pair[1]]))


def _add_tokens(backend: Tokenizer, proto: Any, special: dict[int, AddedToken]) -> None:
    """Special tokens, and the pieces that are whole wherever they stand."""
    whole = (piece.piece for number, piece in enumerate(proto.pieces) if piece.type == piece.USER_DEFINED and number not in special)
    backend.add_tokens([AddedToken(piece, normalized=True, special=False) for piece in whole])
    backend.add_special_tokens([special[number] for number in sorted(special)])
