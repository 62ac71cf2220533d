"""A prompt's text, with a placeholder for each picture → its tokens, where its pictures stand, and the keys of its cache.

Tokenizes as the reference processor does. No text of a user becomes a picture: words that mean one are cut, by a marker that nobody can
guess. Knows nothing of how templates are rendered and pictures loaded.
"""

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.request import ImageInput, ImageSpan, InvalidRequestError, Prompt, make_cache_keys
from vision.families import Family
from vision.image import MeasuredImage, ProcessedImage, salted_hash
from vlm_server.chat_template import TemplateError
from vlm_server.tokenizer import TextTokenizer
from vlm_server.transcript import CutText, Segment, Transcript, TurnPrompt, answer_segment, num_leading


class PromptTokens:
    """One model's tokens. Its methods block, and may be called in any thread."""

    def __init__(
        self, tokenizer: TextTokenizer, family: Family | None, *, brings_special_tokens: bool, shares_caches: bool = False
    ) -> None:
        """family: None for a model that takes no pictures. brings_special_tokens: the template writes those that begin a prompt.

        shares_caches: what one tenant's requests left in the caches is used for another's.
        """
        self.tokenizer = tokenizer
        self.family = family
        self._brings_special_tokens = brings_special_tokens
        self._shares_caches = shares_caches

    def guarded(self, value: Any, marker: str) -> Any:
        """Every string within, cut by `marker` inside each word that means a picture: no user's text becomes one."""
        if isinstance(value, str):
            for word in self.family.reserved if self.family else ():
                value = value.replace(word, word[:1] + marker + word[1:])
            return value
        if isinstance(value, list | tuple):
            return [self.guarded(item, marker) for item in value]
        if isinstance(value, dict):
            return {self.guarded(key, marker): self.guarded(item, marker) for key, item in value.items()}
        return value

    def text_tokens(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text without a template; none of them stands for a picture."""
        marker = new_marker()
        return self._tokenize(self.guarded(text, marker).split(marker), add_special_tokens=add_special_tokens)

    def prompt_without_pictures(self, token_ids: tuple[int, ...], tenant: str) -> Prompt:
        if not token_ids:
            raise InvalidRequestError("prompt: it has no tokens; at least one is needed")
        if self.family is not None and self.family.image_token_id in token_ids:
            raise InvalidRequestError(
                f"prompt: token {self.family.image_token_id} stands for a picture; send pictures as chat messages or image_data"
            )
        return Prompt(token_ids=token_ids, cache_keys=make_cache_keys(token_ids, (), (), salt=self.salt(tenant)), tenant=tenant)

    def chat_tokens(self, text: str, images: Sequence[ProcessedImage | MeasuredImage], marker: str) -> list[int]:
        pieces = self._expanded(text, images).split(marker)
        return self._tokenize(pieces, add_special_tokens=self._adds_special_tokens(text))

    def prompt(self, text: str, images: Sequence[ProcessedImage], marker: str, tenant: str, known: Sequence[Segment]) -> TurnPrompt:
        segments, num_kept = self._segments(text, images, marker, known)
        transcript = Transcript(segments)
        prompt = self.prompt_of(transcript.token_ids, images, tenant)
        return TurnPrompt(prompt, transcript, sum(len(segment.token_ids) for segment in segments[:num_kept]))

    def prompt_of(self, token_ids: tuple[int, ...], images: Sequence[ProcessedImage], tenant: str) -> Prompt:
        """Tokens that have all of the pictures' slots, as the engine takes them."""
        inputs = [self.input_of(image, tenant) for image in images]
        spans = self._spans(token_ids, inputs)
        positions, delta = self._positions(len(token_ids), spans, images)
        keys = make_cache_keys(token_ids, inputs, spans, salt=self.salt(tenant))
        kept, spans = _each_once(inputs, spans)
        return Prompt(
            token_ids=token_ids, cache_keys=keys, images=kept, spans=spans, positions=positions, position_delta=delta, tenant=tenant
        )

    def input_of(self, image: ProcessedImage, tenant: str) -> ImageInput:
        return ImageInput(salted_hash(image.content_hash, self.salt(tenant)), image.num_tokens, image.arrays)

    def salt(self, tenant: str) -> str:
        """Keeps a tenant's entries in every cache apart from the others'; nothing where all share them."""
        return "" if self._shares_caches else tenant

    def answer_segments(self, token_ids: Sequence[int]) -> tuple[Segment, ...]:
        """The end token stands alone: a template may write another one."""
        has_end = bool(token_ids) and self.tokenizer.is_special(token_ids[-1])
        parts = (token_ids[:-1], token_ids[-1:]) if has_end else (token_ids,)
        segments = [answer_segment(part, [self.tokenizer.token_bytes(token_id) for token_id in part]) for part in parts]
        return tuple(segment for segment in segments if segment is not None) if segments[0] is not None else ()

    def _segments(
        self, text: str, images: Sequence[ProcessedImage], marker: str, known: Sequence[Segment]
    ) -> tuple[tuple[Segment, ...], int]:
        """The known segments that the text begins with, then one for the rest of it; and how many are known."""
        whole = CutText.joined(self._expanded(text, images).split(marker))
        num_kept, end = num_leading(known, whole)
        kept = tuple(known[:num_kept])
        before = next((segment.token_ids[-1] for segment in reversed(kept) if segment.token_ids), None)
        if before is not None:
            first, *pieces = whole.pieces(end)
            token_ids = self.tokenizer.encode_after(before, first) + self._tokenize_cut_off(pieces)
            rest = whole.between(end, len(whole.text))
            if self.tokenizer.spells(token_ids, rest.text):  # not where a tokenizer changes the beginning of what it is given
                return (*kept, Segment(rest.text, tuple(token_ids), rest.cuts)), num_kept
        token_ids = self._tokenize(whole.pieces(), add_special_tokens=self._adds_special_tokens(text))
        return (Segment(whole.text, tuple(token_ids), whole.cuts),), 0

    def _adds_special_tokens(self, text: str) -> bool:
        """As the reference: a tokenizer's Jinja template brings its own; a processor adds them unless the text begins with the first."""
        bos = self.tokenizer.reference.bos_token
        is_left_to_us = self.family is not None or not self._brings_special_tokens
        return is_left_to_us and not (bos is not None and text.startswith(str(bos)))

    def _expanded(self, text: str, images: Sequence[ProcessedImage | MeasuredImage]) -> str:
        if self.family is None:
            return text
        gaps = text.split(self.family.placeholder)
        if len(gaps) - 1 != len(images):
            raise TemplateError(
                f"messages: the chat template wrote {len(gaps) - 1} of {self.family.placeholder} for {len(images)} pictures; "
                "pictures are allowed in messages of those roles whose pictures the template writes, and no text may form that word"
            )
        expansions = [self.family.expand(image.layout) for image in images]
        return gaps[0] + "".join(expansion + gap for expansion, gap in zip(expansions, gaps[1:], strict=True))

    def _tokenize(self, pieces: Sequence[str], *, add_special_tokens: bool) -> list[int]:
        """The pieces' tokens, one after the other; no token reaches over a cut."""
        return self.tokenizer.encode(pieces[0], add_special_tokens=add_special_tokens) + self._tokenize_cut_off(pieces[1:])

    def _tokenize_cut_off(self, pieces: Sequence[str]) -> list[int]:
        """The tokens of pieces behind a cut."""
        token_ids: list[int] = []
        for piece in pieces:
            assert self.family is not None  # only its words are cut
            token_ids += self.tokenizer.encode(self.family.image_token + piece)[1:]  # behind a token, no space is put before the piece
        return token_ids

    def _spans(self, token_ids: Sequence[int], images: Sequence[ImageInput]) -> tuple[ImageSpan, ...]:
        """Runs of the image token, each picture taking as many slots as its embedding has rows."""
        if self.family is None:
            return ()
        slots = [slot for slot, token_id in enumerate(token_ids) if token_id == self.family.image_token_id]
        expected = sum(image.num_tokens for image in images)
        assert len(slots) == expected, f"{len(slots)} slots of {self.family.image_token} for {expected} rows of {len(images)} pictures"
        spans: list[ImageSpan] = []
        first = 0
        for index, image in enumerate(images):
            spans += _runs(slots[first : first + image.num_tokens], index, self.family.is_atomic)
            first += image.num_tokens
        return tuple(spans)

    def _positions(
        self, num_slots: int, spans: Sequence[ImageSpan], images: Sequence[ProcessedImage]
    ) -> tuple[tuple[tuple[int, ...], ...] | None, int]:
        if self.family is None or not images:
            return None, 0
        starts = [span.start for span in spans if span.offset == 0]
        return self.family.positions(num_slots, [(start, image.layout) for start, image in zip(starts, images, strict=True)])


def _each_once(images: Sequence[ImageInput], spans: Sequence[ImageSpan]) -> tuple[tuple[ImageInput, ...], tuple[ImageSpan, ...]]:
    """Each of equal pictures' first one, and the spans by their numbers among these. The others' arrays are closed."""
    kept: dict[bytes, ImageInput] = {}
    for image in images:
        if kept.setdefault(image.content_hash, image) is not image:
            image.close()
    numbers = {content_hash: number for number, content_hash in enumerate(kept)}
    return tuple(kept.values()), tuple(replace(span, image=numbers[images[span.image].content_hash]) for span in spans)


def _runs(slots: Sequence[int], image: int, is_atomic: bool) -> list[ImageSpan]:
    """One span per unbroken run of slots."""
    spans = []
    start = 0
    for index in range(1, len(slots) + 1):
        if index == len(slots) or slots[index] != slots[index - 1] + 1:
            spans.append(ImageSpan(slots[start], index - start, image, start, is_atomic))
            start = index
    return spans


def new_marker() -> str:
    """A cut that no text holds: private characters around a number that nobody can guess."""
    return f"\ue000{secrets.randbits(64)}\ue001"
