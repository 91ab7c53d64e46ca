"""How generated texts are written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Style:
    """Numbers of facts and words, and rates between 0 and 1.

    A part is about one thing and states `min_facts` to `max_facts` facts on it; sentences without a fact fill it up
    to about `part_words` words (0: no filling). Rates per fact: `short`, a pronoun in place of the name; `turned`, the
    value before the name. Rates per name: `wild`, built from rare syllables rather than the usual pieces. Per part:
    `cuts`, the text goes on in the next part, half of the time in mid-sentence, half of the time with a pronoun. Per
    named person or place: `bridges`, it is what another part is about, if any is. Per corpus: `same_kind`, all parts
    are about one kind of thing, so that only the name tells their facts apart.
    """

    min_facts: int = 4
    max_facts: int = 6
    part_words: int = 104
    short: float = 0.4
    turned: float = 0.0
    wild: float = 0.0
    cuts: float = 0.5
    bridges: float = 0.4
    same_kind: float = 0.4


PLAIN_STYLE = Style()
