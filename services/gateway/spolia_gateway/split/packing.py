"""Sentences packed into chunks, so that an edit moves few of the cuts.

A chunk may end after any sentence that leaves it between `MIN_FILL` of the limit and the limit. It ends after the one
among them whose text hashes lowest. Which that is does not depend on where the chunk began as long as the sentence is
a candidate, so behind an edit the old and the new cuts soon meet, and from there on they are the same. Unlike anchors
of a fixed rate the lowest hash always exists, and at every limit.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from zlib import crc32

from spolia_gateway.split.boundaries import SENTENCE_END, ends_of
from spolia_gateway.split.encoded_text import EncodedText

MIN_FILL = 0.6
"""Measured on prose (docs/split.md): more gives longer chunks and loses more of them to an edit, less the reverse."""


def pack_sentences(encoded: EncodedText, first: int, last: int, start: int, end: int, max_tokens: int) -> list[int]:
    """Token indices at which chunks of the tokens `first` … `last` end, ascending; the last is `last`.

    `start` … `end` are the characters of these tokens. No chunk is longer than `max_tokens`. A sentence that is longer
    is cut at that length, and the rest of the text is one chunk as soon as it fits.
    """
    sentence_ends: list[int] | None = None
    min_tokens = max(1, int(max_tokens * MIN_FILL))
    cuts = []
    while last - first > max_tokens:
        if sentence_ends is None:
            sentence_ends = ends_of(SENTENCE_END, encoded.text, start, end)
        first = _chunk_end(encoded, sentence_ends, first, start, min_tokens, max_tokens)
        cuts.append(first)
    return [*cuts, last]


def _chunk_end(
    encoded: EncodedText, sentence_ends: Sequence[int], first: int, start: int, min_tokens: int, max_tokens: int
) -> int:
    # A sentence that ends at character c leaves a chunk of at least n tokens when token first + n - 1 begins before c,
    # and of at most n when token first + n begins at c or behind it.
    starts = encoded.starts
    low = bisect_right(sentence_ends, starts[first + min_tokens - 1])
    high = bisect_right(sentence_ends, starts[first + max_tokens])
    if low < high:
        return encoded.token_at(_anchor(encoded.text, sentence_ends, low, high, start))
    if low > 0:  # the next sentence is too long to go in, and what stands before it is short
        end = encoded.token_at(sentence_ends[low - 1])
        if end > first:
            return end
    return first + max_tokens


def _anchor(text: str, sentence_ends: Sequence[int], low: int, high: int, start: int) -> int:
    """Where the sentence ends whose text hashes lowest among `low` … `high`; of equal ones the last.

    What a sentence hashes to is the same wherever it stands and in every process.
    """
    lowest, anchor = 1 << 32, 0
    begin = sentence_ends[low - 1] if low else start
    for end in sentence_ends[low:high]:
        value = crc32(text[begin:end].encode())
        if value <= lowest:
            lowest, anchor = value, end
        begin = end
    return anchor
