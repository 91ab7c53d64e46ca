"""A text beside its tokens: where a character's token is."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EncodedText:
    """A text, its token ids, and the character at which each token begins, never decreasing.

    Tokens that are bytes of one character begin at that character, all of them. The arrays are shared: do not change
    them.
    """

    text: str
    token_ids: tuple[int, ...]
    starts: array[int]

    def token_at(self, character: int) -> int:
        """The first token that begins at or after `character`; the number of tokens where none does."""
        return bisect_left(self.starts, character)
