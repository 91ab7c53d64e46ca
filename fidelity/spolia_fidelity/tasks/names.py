"""Invented names and values. A name is a pair of pieces; one pair in eight is *held out*, never used for training."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from random import Random

from spolia_fidelity.tasks import lexicon
from spolia_fidelity.tasks.lexicon import words

_HELD_OUT_SHARE = 8
_PIECES: dict[str, tuple[Sequence[str], Sequence[str], str]] = {
    "village": (lexicon.PLACE_HEADS, lexicon.PLACE_TAILS, ""),
    "place": (lexicon.PLACE_HEADS, lexicon.PLACE_TAILS, ""),
    "school": (lexicon.PLACE_HEADS, lexicon.PLACE_TAILS, ""),
    "ship": (lexicon.PLACE_HEADS, lexicon.SHIP_TAILS, ""),
    "castle": (lexicon.PLACE_HEADS, lexicon.CASTLE_TAILS, ""),
    "inn": (lexicon.INN_ADJECTIVES, lexicon.INN_NOUNS, " "),
    "person": (lexicon.FIRST_NAMES, lexicon.LAST_NAMES, " "),
}
_VALUES: dict[str, Sequence[str]] = {
    "goods": lexicon.GOODS,
    "year": lexicon.YEARS,
    "month": lexicon.MONTHS,
    "colour": lexicon.COLOURS,
    "animal": lexicon.ANIMALS,
    "stone": lexicon.STONES,
    "profession": lexicon.PROFESSIONS,
    "subject": lexicon.SUBJECTS,
}
_WILD_ONSETS = words("b bl c ch d dr f fl g gl h j k l m n p pr qu r s sh sl t v w y z")
_WILD_RIMES = words("a ai ane ash e ea eck em i ia ick ine o oan ock oss u ub uff umb y ystra")


def is_held_out(name: str) -> bool:
    """Tells whether training may never show this pair of name pieces."""
    return zlib.crc32(name.encode()) % _HELD_OUT_SHARE == 0


def make_name(rng: Random, pool: str, held_out: bool, wild: bool = False) -> str:
    """Draws a name from one side of the held-out split; `wild` names are made of syllables in no list."""
    if wild:
        count = 2 if pool in ("inn", "person") else 1
        return " ".join(_wild_word(rng) for _ in range(count))
    heads, tails, joint = _PIECES[pool]
    while True:
        name = rng.choice(heads) + joint + rng.choice(tails)
        if is_held_out(name) == held_out:
            return name


def make_value(rng: Random, value: str, held_out: bool, wild: bool = False) -> str:
    """Draws what a fact says: a word of a list, or a name."""
    if value in _VALUES:
        return rng.choice(_VALUES[value])
    return make_name(rng, value, held_out, wild)


def _wild_word(rng: Random) -> str:
    return "".join(rng.choice(_WILD_ONSETS) + rng.choice(_WILD_RIMES) for _ in range(rng.randint(2, 3))).capitalize()
