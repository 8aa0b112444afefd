"""Token ids of texts of any length: long ones are encoded in pieces, because the library holds some
160 bytes a character while it encodes.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator

Span = tuple[int, int]  # the characters of a token
Encode = Callable[[str], tuple[list[int], list[Span]]]

PIECE = 2**16  # characters
_BESIDE = 2**11  # characters encoded with a piece on either side, so that its ends are not seen
_ALIKE = 8  # tokens on either side of a cut that both pieces must have in common


def encode_pieces(encode: Encode, text: str) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the ids of a text, and the character after each token, piece by piece.

    Neighbouring pieces overlap and are cut where both have the same tokens, so the ids are those of
    the whole text. Where there is no such position (one word of thousands of characters), the
    next piece starts over and a token may differ. `encode` gets up to 72,000 characters.
    """
    done = first = 0  # characters and tokens of the window that have been yielded
    ids, spans = _window(encode, text, 0)
    while (end := done + PIECE) + _BESIDE < len(text):
        following, their_spans = _window(encode, text, end - _BESIDE)
        cut, there = _common(ids, spans, following, their_spans, end)
        if there < 0:
            done = spans[cut][0]
            following, their_spans = _window(encode, text, done)
            there = 0
        else:
            done = end
        yield ids[first:cut], [after for _, after in spans[first:cut]]
        ids, spans, first = following, their_spans, there
    yield ids[first:], [after for _, after in spans[first:]]


def _window(encode: Encode, text: str, start: int) -> tuple[list[int], list[Span]]:
    ids, spans = encode(text[start : start + PIECE + 3 * _BESIDE])
    return ids, [(start + a, start + b) for a, b in spans]


def _common(
    ids: list[int], spans: list[Span], following: list[int], their_spans: list[Span], middle: int
) -> tuple[int, int]:
    """Return the index of one token in two windows, with the same tokens around it; else -1."""
    low, high = (bisect_left(spans, (middle + n, 0)) for n in (-_BESIDE, _BESIDE))
    there = {span: i for i, span in enumerate(their_spans) if span[0] < middle + _BESIDE}
    for i in sorted(range(low, high), key=lambda i: abs(spans[i][0] - middle)):
        j = there.get(spans[i], -1)
        around = slice(i - _ALIKE, i + _ALIKE), slice(j - _ALIKE, j + _ALIKE)
        if min(i, j) >= _ALIKE and ids[around[0]] == following[around[1]]:
            return i, j
    cut = min(bisect_left(spans, (middle, 0)), len(spans) - 1)
    while cut > 0 and spans[cut][0] < spans[cut - 1][1]:  # a character of several tokens
        cut -= 1
    return cut, -1
