"""A document's token ids, cut into consecutive pieces."""

from __future__ import annotations

from spolia_core.splitting import Splitter, Splitting
from spolia_gateway.split.boundaries import PARAGRAPH_END, ends_of
from spolia_gateway.split.encoded_text import EncodedText
from spolia_gateway.split.packing import pack_sentences


def split(encoded: EncodedText, splitting: Splitting) -> list[tuple[int, ...]]:
    """Pieces that add up to `encoded.token_ids`, none of them empty; no piece at all of no tokens.

    But for `DOCUMENT`, none is longer than `splitting.max_tokens`. Ids are cut, never encoded again: a piece begins
    with the first token that begins at or after the character at which the text is cut.
    """
    if not encoded.token_ids:
        return []
    cuts = _cuts(encoded, splitting)
    return [encoded.token_ids[begin:end] for begin, end in zip([0, *cuts], cuts, strict=False)]


def _cuts(encoded: EncodedText, splitting: Splitting) -> list[int]:
    """Token indices at which pieces end, ascending; the last is the number of tokens."""
    num_tokens, limit = len(encoded.token_ids), splitting.max_tokens
    match splitting.splitter:
        case Splitter.DOCUMENT:
            return [num_tokens]
        case Splitter.PARAGRAPH:
            return _paragraph_cuts(encoded, limit)
        case Splitter.SENTENCE:
            return pack_sentences(encoded, 0, num_tokens, 0, len(encoded.text), limit)
        case Splitter.FIXED:
            return [*range(limit, num_tokens, limit), num_tokens]


def _paragraph_cuts(encoded: EncodedText, limit: int) -> list[int]:
    cuts: list[int] = []
    first, start, text_end = 0, 0, len(encoded.text)
    for end in ends_of(PARAGRAPH_END, encoded.text, 0, text_end):
        last = encoded.token_at(end) if end < text_end else len(encoded.token_ids)
        if last > first:  # else a token of the paragraph before holds all of it
            cuts += [last] if last - first <= limit else pack_sentences(encoded, first, last, start, end, limit)
            first = last
        start = end
    return cuts
