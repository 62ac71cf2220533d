"""Token ids in, text out, as soon as it can no longer change.

Text is held back while its last character may lack bytes, and while it may be the beginning of a stop string.
Knows nothing of requests or of HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

_REPLACEMENT = "\ufffd"  # how a decoder shows bytes that are no character, or not yet
_MAX_WINDOW = 8  # tokens decoded again with each new one, at most about so many
_MAX_UNRESOLVED = 16  # tokens; a character has four bytes, so more than four are garbage and not an unfinished character
_MAX_INCOMPLETE = 3  # tokens that an unfinished character can reach back


class TextDecoder(Protocol):
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True, slots=True)
class StopWords:
    """What ends an answer before its limit, beside the model's own end tokens."""

    strings: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()  # of words that are whole tokens, whose text a decoder may leave out


class IncrementalDecoder:
    """The text of a growing list of token ids, in pieces; the pieces together equal the decoded whole, up to an unfinished last character.

    Decodes a window of the last tokens again with each new one, since what a token looks like may depend on its neighbours
    (bytes of one character, spaces between words).
    """

    def __init__(self, decoder: TextDecoder, *, before: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        """before: the last tokens of the text that is continued, whose own text is not given again."""
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        self._window = list(before)
        self._text = self._decode(self._window) if before else ""  # of the window
        self._num_given = len(self._text.rstrip(_REPLACEMENT))  # characters of it that were returned
        self.num_settled = 0  # characters not yet returned before the last token that it showed to be no part of its own
        is_whole = self._num_given == len(self._text)
        self._boundaries = [0, len(before) if is_whole else 0]  # the last two places in the window where every character was complete

    def add(self, token_id: int) -> str:
        """The text that became certain; never a part of a character."""
        text = self._decode([*self._window, token_id])
        self.num_settled = self._num_settled_by(text)
        if text == self._text and self._num_given and not text.endswith(_REPLACEMENT):
            return ""  # a skipped token; it would separate its neighbours
        self._window.append(token_id)
        self._text = text
        stable = text.rstrip(_REPLACEMENT)
        if len(stable) < len(text) and len(self._window) - self._boundaries[1] <= _MAX_UNRESOLVED:
            return self._give(len(stable))
        if len(stable) < len(text):
            return self._give_up()
        self._boundaries = [self._boundaries[1], len(self._window)]
        new = self._give(len(text))
        if len(self._window) > _MAX_WINDOW:
            self._shrink()
        return new

    def finish(self) -> str:
        """What was held back, without the bytes of a character that was never finished."""
        return self._give(len(self._text.rstrip(_REPLACEMENT)))

    def _num_settled_by(self, text: str) -> int:
        """How many replacement characters at the end of the window's text stay with a token more; the last character may be its own."""
        new = text[self._num_given :]
        num_kept = len(new) - len(new.lstrip(_REPLACEMENT))
        return max(0, min(len(self._text) - self._num_given, num_kept, len(new) - 1))

    def _give(self, end: int) -> str:
        new = self._text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        return new

    def _shrink(self) -> None:
        """Keeps the last complete characters, which the next token needs as its left neighbour."""
        kept = self._window[self._boundaries[0] :]
        text = self._decode(kept)
        if text and self._text.endswith(text):
            self._window, self._text, self._num_given, self._boundaries = kept, text, len(text), [0, len(kept)]

    def _give_up(self) -> str:
        """All but the last replacement character of a long run is garbage for good."""
        new = self._give(len(self._text) - 1)
        self._window = self._window[-_MAX_INCOMPLETE:]
        self._text = self._decode(self._window)
        self._num_given = len(self._text) - 1
        self._boundaries = [0, 0]
        return new

    def _decode(self, token_ids: list[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


class StopMatcher:
    """Finds the first stop string to be complete, character by character, and says how much text may be its beginning.

    Knuth, Morris and Pratt's automaton per stop string, so that the cost per character does not depend on the strings' lengths.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _failures(stop)) for stop in stops]
        self._matched = [0] * len(self._stops)  # characters of each stop string that the text ends with

    def feed(self, text: str) -> tuple[int, str] | None:
        """(place in `text` after the match, the stop string), the longest of those that end first; None without a match."""
        for place, character in enumerate(text, start=1):
            found = ""
            for index, (stop, failures) in enumerate(self._stops):
                self._matched[index] = _advance(stop, failures, self._matched[index], character)
                if self._matched[index] == len(stop) > len(found):
                    found = stop
            if found:
                return place, found
        return None

    @property
    def num_held(self) -> int:
        """The characters at the text's end that may be the beginning of a stop string."""
        return max(self._matched, default=0)


def _failures(stop: str) -> list[int]:
    """For each prefix of `stop`, by its length: the length of its longest proper prefix that it also ends with."""
    failures = [0, 0]
    for character in stop[1:]:
        failures.append(_advance(stop, failures, failures[-1], character))
    return failures


def _advance(stop: str, failures: list[int], matched: int, character: str) -> int:
    while matched and (matched == len(stop) or stop[matched] != character):
        matched = failures[matched]
    return matched + 1 if stop[matched] == character else 0


class Detokenizer:
    """One answer's text, cut before the first stop string (or after it, with `includes_stop`)."""

    def __init__(
        self,
        decoder: TextDecoder,
        *,
        before: Sequence[int] = (),
        stops: Sequence[str] = (),
        includes_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        """before: the last tokens of the text that the answer continues."""
        self._decoder = IncrementalDecoder(decoder, before=before, skip_special_tokens=skip_special_tokens)
        self._matcher = StopMatcher(stops)
        self._includes_stop = includes_stop
        self._min_tokens = min_tokens  # text of earlier tokens is not searched for stop strings
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self.num_tokens = 0  # taken, up to the one that completed a stop string
        self.num_characters = 0  # released
        self.num_decoded = 0  # characters released or held
        self.start = 0  # characters of the text before the last token's; the same for all tokens of one character
        self.stop_string: str | None = None  # the one that was found; further tokens are ignored

    @property
    def is_stopped(self) -> bool:
        return self.stop_string is not None

    def add(self, token_id: int) -> str:
        """The text that is released by one more token."""
        if self.is_stopped:
            return ""
        self.num_tokens += 1
        added = self._decoder.add(token_id)
        self.start = self.num_decoded + self._decoder.num_settled
        return self._search(added)

    def finish(self) -> str:
        """What was held back, unless a stop string was found."""
        if self.is_stopped:
            return ""
        released = self._search(self._decoder.finish())
        if self.is_stopped:
            return released
        rest, self._held = self._held, ""
        self.num_characters += len(rest)
        return released + rest

    def _search(self, text: str) -> str:
        self.num_decoded += len(text)
        found = self._matcher.feed(text) if self.num_tokens >= self._min_tokens else None
        if found is None:
            return self._release(self._held + text, self._matcher.num_held)
        place, self.stop_string = found
        return self._release(self._held + text[:place], 0 if self._includes_stop else len(self.stop_string))

    def _release(self, text: str, num_held: int) -> str:
        cut = len(text) - num_held
        self._held = text[cut:]
        self.num_characters += cut
        return text[:cut]
