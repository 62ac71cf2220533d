from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_server.transcript import CutText, Segment, answer_segment, num_leading

PIECES = st.lists(st.text(alphabet="ab<", max_size=4), min_size=1, max_size=6)


@settings(deadline=None)
@given(PIECES, st.data())
def test_a_text_falls_into_its_pieces_again_from_any_place_on(pieces: list[str], data: st.DataObject) -> None:
    text = CutText.joined(pieces)
    start = data.draw(st.integers(0, len(text.text)))

    assert "".join(text.pieces(start)) == text.text[start:]
    assert [piece for piece in text.pieces() if piece] == [piece for piece in pieces if piece]


@settings(deadline=None)
@given(st.lists(PIECES, max_size=4), PIECES)
def test_all_segments_of_a_text_are_found_at_its_beginning(parts: list[list[str]], rest: list[str]) -> None:
    segments = [Segment(part.text, (), part.between(0, len(part.text)).cuts) for part in map(CutText.joined, parts)]
    joined = "".join(segment.text for segment in segments)
    cuts = [len("".join(s.text for s in segments[:i])) + cut for i, segment in enumerate(segments) for cut in segment.cuts]
    whole = CutText(joined + "".join(rest), tuple(cuts))

    assert num_leading(segments, whole) == (len(segments), len(joined))


def test_segments_are_used_up_to_the_first_that_reads_otherwise() -> None:
    segments = [Segment("user: hi\n", (1, 2)), Segment(" Hello", (3,)), Segment("\nuser: ", (4,))]

    assert num_leading(segments, CutText("user: hi\n Hello\nuser: and?")) == (3, 22)
    assert num_leading(segments, CutText("user: hi\nHello\nuser: and?")) == (1, 9)
    assert num_leading(segments, CutText("system: x\nuser: hi\n")) == (0, 0)


def test_a_segment_with_other_cuts_is_another_text() -> None:
    """Else a client's words could take the place of a picture's tokens, or a picture the place of a client's words."""
    plain, cut = Segment("a <image>", (7, 8)), Segment("a <image>", (7, 5, 6), (3,))

    assert num_leading([plain], CutText("a <image>", (3,))) == (0, 0)
    assert num_leading([cut], CutText("a <image>")) == (0, 0)
    assert num_leading([cut], CutText("a <image>b", (3,))) == (1, 9)


def test_an_answer_is_kept_where_its_tokens_are_a_whole_text() -> None:
    assert answer_segment([5, 6], [b"a", "é".encode()]) == Segment("aé", (5, 6))
    assert answer_segment([5], ["é".encode()[:1]]) is None
