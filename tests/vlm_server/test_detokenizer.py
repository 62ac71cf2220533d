"""The detokenizer's pieces against the whole text, for any token stream."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from tests.vlm_server.byte_tokenizer import EOS, VOCAB_SIZE, ByteTokenizer
from vlm_server.detokenizer import Detokenizer, IncrementalDecoder, StopMatcher

TOKENIZER = ByteTokenizer()
any_tokens = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=80)
invalid_bytes = st.lists(st.sampled_from([0xFF, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x41]), max_size=80)
text_tokens = st.text(st.sampled_from("STOP你好🌍é a"), max_size=40).map(TOKENIZER.encode)


@given(any_tokens | invalid_bytes | text_tokens, st.booleans())
@settings(max_examples=400)
def test_the_pieces_together_equal_the_decoded_whole_up_to_an_unfinished_character(token_ids: list[int], skip: bool) -> None:
    decoder = IncrementalDecoder(TOKENIZER, skip_special_tokens=skip)

    pieces = [decoder.add(token_id) for token_id in token_ids] + [decoder.finish()]

    whole, text = TOKENIZER.decode(token_ids, skip_special_tokens=skip), "".join(pieces)
    assert whole.startswith(text)
    assert whole[len(text) :].strip("\ufffd") == ""  # the last character may be unfinished


@given(st.lists(st.sampled_from([0xFF, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x41, 0x42]), max_size=16))
@settings(max_examples=400)
def test_a_token_begins_behind_the_garbage_before_it(token_ids: list[int]) -> None:
    """Of single bytes, which Python replaces by whole invalid sequences."""
    detokenizer = Detokenizer(TOKENIZER)

    starts = []
    for token_id in token_ids:
        detokenizer.add(token_id)
        starts.append(detokenizer.start)

    assert starts == [len(TOKENIZER.decode(token_ids[: end + 1])) - 1 for end in range(len(token_ids))]


@given(st.text(max_size=60))
def test_no_piece_of_valid_text_holds_a_cut_character(text: str) -> None:
    decoder = IncrementalDecoder(TOKENIZER)

    pieces = [decoder.add(token_id) for token_id in TOKENIZER.encode(text.replace("\ufffd", ""))]

    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text.replace("\ufffd", "")


class SentencePieces:
    """Words with a space before them, and bytes for what has no piece, as Llama's and InternLM's tokenizers."""

    def __init__(self) -> None:
        words = ["<unk>", "</s>", "▁", "▁the", "▁a", "a", "he", "你", "!"]
        vocab = {word: number for number, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
        self._backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
        self._backend.add_special_tokens(["</s>"])
        self._backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        self._vocab = vocab

    def pieces(self, text: str) -> list[int]:
        """One piece or several bytes per character."""
        ids = [[self._vocab.get(character.replace(" ", "▁"))] for character in text]
        return [number for character, found in zip(text, ids, strict=True) for number in (found if found[0] else self._bytes(character))]

    def _bytes(self, character: str) -> list[int]:
        return [self._vocab[f"<0x{byte:02X}>"] for byte in character.encode()]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))


PIECES = SentencePieces()


@given(st.lists(st.integers(0, 8), max_size=40))
def test_spaces_between_pieces_are_kept_beside_skipped_tokens(token_ids: list[int]) -> None:
    decoder = IncrementalDecoder(PIECES)

    text = "".join([decoder.add(token_id) for token_id in token_ids] + [decoder.finish()])

    assert text == PIECES.decode(token_ids)


@given(st.text(st.sampled_from("a 你好吗🌍é!"), max_size=30))
def test_characters_without_a_piece_of_their_own_are_put_together_from_bytes(text: str) -> None:
    decoder = IncrementalDecoder(PIECES)

    pieces = [decoder.add(token_id) for token_id in PIECES.pieces(text)]

    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text.removeprefix(" ")


def test_a_character_is_released_with_its_last_byte() -> None:
    decoder = IncrementalDecoder(TOKENIZER)

    assert [decoder.add(token_id) for token_id in "你🌍a".encode()] == ["", "", "你", "", "", "", "🌍", "a"]


def test_the_window_stays_small_over_a_long_answer() -> None:
    decoder = IncrementalDecoder(_Counting())
    for token_id in [*b"hello" * 200, *[EOS] * 100, *[0xFF] * 100, *"你".encode() * 100]:
        decoder.add(token_id)

    assert _Counting.longest <= 40


class _Counting(ByteTokenizer):
    longest = 0

    def decode(self, token_ids, *, skip_special_tokens=True):  # type: ignore[no-untyped-def]
        _Counting.longest = max(_Counting.longest, len(token_ids))
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


stop_lists = st.lists(st.text(st.sampled_from("abS你"), min_size=1, max_size=6), max_size=4)
stop_texts = st.text(st.sampled_from("abS你"), max_size=40)


def _first_stop(text: str, stops: list[str]) -> tuple[int, int] | None:
    """(start, end) of the stop string that ends first, the longest of several; the slow way."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return end - max(lengths), end
    return None


@given(stop_texts, stop_lists, st.booleans())
@settings(max_examples=400)
def test_the_text_ends_at_the_first_stop_string(text: str, stops: list[str], includes_stop: bool) -> None:
    detokenizer = Detokenizer(TOKENIZER, stops=stops, includes_stop=includes_stop)

    released = "".join([detokenizer.add(token_id) for token_id in TOKENIZER.encode(text)] + [detokenizer.finish()])

    found = _first_stop(text, stops)
    assert detokenizer.stop_string == (None if found is None else text[found[0] : found[1]])
    assert detokenizer.is_stopped == (found is not None)
    assert released == (text if found is None else text[: found[1] if includes_stop else found[0]])


@given(stop_texts, stop_lists)
def test_what_is_released_is_never_taken_back_by_a_stop_string(text: str, stops: list[str]) -> None:
    detokenizer = Detokenizer(TOKENIZER, stops=stops)
    found = _first_stop(text, stops)
    limit = len(text) if found is None else found[0]

    num_released = 0
    for token_id in TOKENIZER.encode(text):
        num_released += len(detokenizer.add(token_id))
        assert num_released == detokenizer.num_characters <= limit


def test_a_stop_string_across_many_tokens_leaks_no_part() -> None:
    detokenizer = Detokenizer(TOKENIZER, stops=["<|end of answer|>"])

    pieces = [detokenizer.add(token_id) for token_id in b"ok<|end of x <|end of answer|> more"]

    assert "".join(pieces) == "ok<|end of x "
    assert detokenizer.is_stopped
    assert detokenizer.finish() == ""


def test_held_text_is_released_at_the_end() -> None:
    detokenizer = Detokenizer(TOKENIZER, stops=["END"])

    assert "".join(detokenizer.add(token_id) for token_id in b"the EN") == "the "
    assert detokenizer.finish() == "EN"


def test_tokens_after_the_stop_string_are_not_counted() -> None:
    detokenizer = Detokenizer(TOKENIZER, stops=["b"])

    for token_id in b"abcd":
        detokenizer.add(token_id)

    assert detokenizer.num_tokens == 2


def test_stop_strings_are_not_searched_before_min_tokens() -> None:
    detokenizer = Detokenizer(TOKENIZER, stops=["b"], min_tokens=3)

    released = "".join(detokenizer.add(token_id) for token_id in b"abcbd")

    assert released == "abc"


def test_overlapping_stop_strings_are_found_by_the_automaton() -> None:
    assert StopMatcher(["aab"]).feed("aaab") == (4, "aab")
    assert StopMatcher(["abab", "b"]).feed("xab") == (3, "b")
