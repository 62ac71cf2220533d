"""The tokens of a conversation so far, kept as they were, so that a later turn begins with exactly them.

Text does not give tokens back: what a model wrote may be cut into other tokens than its text would be, and a prompt with other tokens finds
nothing in the prefix cache. So tokens are kept with the text that they stand for, and used again as far as the template still writes
that text. Knows nothing of models, of stores or of HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from engine.request import Prompt


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a conversation: what the template adds before an answer, or the answer."""

    text: str  # pictures written out to their tokens' text
    token_ids: tuple[int, ...]
    cuts: tuple[int, ...] = ()  # places in the text that no token reaches over, since a client's words look like a picture there


@dataclass(frozen=True, slots=True)
class Transcript:
    """A conversation's segments in order, and the fingerprint of the tokenizer whose ids they hold."""

    segments: tuple[Segment, ...] = ()
    tokenizer: str = ""

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token_id for segment in self.segments for token_id in segment.token_ids)


@dataclass(frozen=True, slots=True)
class TurnPrompt:
    """A conversation's prompt, and how it was put together."""

    prompt: Prompt
    transcript: Transcript  # whose tokens are the prompt's
    num_known_tokens: int  # of those that were known before


@dataclass(frozen=True, slots=True)
class CutText:
    """A text, and the places that no token may reach over, in order."""

    text: str
    cuts: tuple[int, ...] = ()

    @classmethod
    def joined(cls, pieces: Sequence[str]) -> "CutText":
        """The text of the pieces, cut between each two."""
        cuts = []
        end = 0
        for piece in pieces[:-1]:
            end += len(piece)
            cuts.append(end)
        return cls("".join(pieces), tuple(cuts))

    def pieces(self, start: int = 0) -> list[str]:
        """The text from `start` on, between the cuts."""
        borders = [start, *(cut for cut in self.cuts if cut > start), len(self.text)]
        return [self.text[begin:end] for begin, end in pairwise(borders)]

    def between(self, start: int, end: int) -> "CutText":
        """A stretch, its cuts counted from its own beginning; one at its beginning is none within it."""
        return CutText(self.text[start:end], tuple(cut - start for cut in self.cuts if start < cut < end))


def num_leading(segments: Sequence[Segment], whole: CutText) -> tuple[int, int]:
    """How many of the segments, one after the other, `whole` begins with, and how many characters they are."""
    end = 0
    for number, segment in enumerate(segments):
        begin, end = end, end + len(segment.text)
        if whole.between(begin, end) != CutText(segment.text, segment.cuts):
            return number, begin
    return len(segments), end


def answer_segment(token_ids: Sequence[int], token_bytes: Sequence[bytes]) -> Segment | None:
    """An answer's tokens with the text that they spell; None where they end within a character or spell none."""
    try:
        return Segment(b"".join(token_bytes).decode(), tuple(token_ids))
    except UnicodeDecodeError:
        return None
