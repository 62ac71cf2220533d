"""Where the pictures of a prompt without messages stand: at its own placeholders, or before its text.

Works on texts and on token ids; knows nothing of how pictures are loaded or of requests.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

from engine.request import InvalidRequestError
from vision.families import Family, Layout
from vlm_server.tokenizer import TextTokenizer


def text_with_placeholders(
    text: str, num_pictures: int, family: Family, *, guarded: Callable[[str], str], left_out: Collection[int] = ()
) -> str:
    """The text with a placeholder per picture: its own where it has as many, else all of them before it.

    guarded: what makes of a text one that means no picture. left_out: numbers of pictures that have none, nor what stands around it.
    """
    pieces = text.split(family.placeholder)
    if len(pieces) - 1 != num_pictures:
        return (family.framed_placeholder + family.rules.gap) * (num_pictures - len(left_out)) + guarded(text)
    kept = pieces[:1]
    for number, piece in enumerate(pieces[1:]):
        if number in left_out:
            kept[-1] = _joined(kept[-1], piece, family.rules.frame)
        else:
            kept.append(piece)
    return family.placeholder.join(map(guarded, kept))


def _joined(before: str, after: str, frame: tuple[str, str]) -> str:
    """The text without a placeholder, and without its frame where that is around it."""
    begin, end = frame
    if before.endswith(begin) and after.startswith(end):
        return before[: len(before) - len(begin)] + after[len(end) :]
    return before + after


def ids_without(
    token_ids: Sequence[int], num_pictures: int, left_out: Collection[int], family: Family, tokenizer: TextTokenizer
) -> list[int] | None:
    """The token ids without the placeholders of these pictures; None where it cannot be told which tokens are theirs."""
    placeholder_id = tokenizer.token_id(family.placeholder)
    places = [place for place, token_id in enumerate(token_ids) if token_id == placeholder_id]
    is_written_out = placeholder_id != family.image_token_id and family.image_token_id in token_ids
    if not left_out or not (places or is_written_out):
        return list(token_ids)
    if is_written_out or len(places) != num_pictures:
        return None
    begin, end = (tokenizer.encode(text) if text else [] for text in family.rules.frame)
    kept = list(token_ids)
    for number in sorted(left_out, reverse=True):
        first, last = places[number], places[number] + 1
        if kept[first - len(begin) : first] == begin and kept[last : last + len(end)] == end:
            first, last = first - len(begin), last + len(end)
        del kept[first:last]
    return kept


def ids_with_pictures(token_ids: Sequence[int], layouts: Sequence[Layout], family: Family, tokenizer: TextTokenizer) -> list[int]:
    """The token ids with every picture's tokens in them.

    Ids that have them already stay as they are; a placeholder per picture is written out; without any, the pictures come first, behind the
    token that begins a text. Raises InvalidRequestError for any other number of placeholders.
    """
    num_slots = sum(family.num_tokens(layout) for layout in layouts)
    placeholder_id = tokenizer.token_id(family.placeholder)
    num_placeholders = token_ids.count(placeholder_id) if placeholder_id is not None else 0
    if token_ids.count(family.image_token_id) == num_slots:
        written = list(token_ids)
    elif num_placeholders == len(layouts):
        expansions = iter([tokenizer.encode(family.expand(layout)) for layout in layouts])
        written = list(_written_out(token_ids, placeholder_id, expansions))
    elif num_placeholders == 0:
        written = _before(token_ids, [_framed(layout, family) for layout in layouts], tokenizer)
    else:
        written = []
    if written.count(family.image_token_id) != num_slots:
        raise InvalidRequestError(
            f"input_ids: {num_placeholders} times token {placeholder_id} for {len(layouts)} pictures; as many are allowed, none, or all "
            f"{num_slots} of token {family.image_token_id} that the pictures take"
        )
    if not _are_whole(written, layouts, family):
        raise InvalidRequestError(f"input_ids: the tokens {family.image_token_id} of one picture stand together with this model")
    return written


def _are_whole(token_ids: Sequence[int], layouts: Sequence[Layout], family: Family) -> bool:
    """Whether each picture's slots are one run, where positions or attention want that."""
    if not (family.has_positions or family.is_atomic):
        return True
    slots = iter([slot for slot, token_id in enumerate(token_ids) if token_id == family.image_token_id])
    runs = ([next(slots) for _ in range(family.num_tokens(layout))] for layout in layouts)
    return all(run[-1] - run[0] == len(run) - 1 for run in runs)


def _written_out(token_ids: Sequence[int], placeholder_id: int | None, expansions: Iterator[list[int]]) -> Iterator[int]:
    for token_id in token_ids:
        if token_id == placeholder_id:
            yield from next(expansions)
        else:
            yield token_id


def _before(token_ids: Sequence[int], texts: Sequence[str], tokenizer: TextTokenizer) -> list[int]:
    num_first = int(bool(token_ids) and token_ids[0] == tokenizer.reference.bos_token_id)
    return [*token_ids[:num_first], *tokenizer.encode("".join(texts)), *token_ids[num_first:]]


def _framed(layout: Layout, family: Family) -> str:
    before, after = family.rules.frame
    return before + family.expand(layout) + after + family.rules.gap
