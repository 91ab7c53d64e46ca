"""Texts to be cut: prose that looks like prose, and a tokenizer of whole words that needs no training."""

from __future__ import annotations

import random
import re
from array import array
from zlib import crc32

from spolia_gateway.split import EncodedText

VOCABULARY = [
    ["stone", "building", "column", "arch", "wall", "temple", "mason", "quarry", "marble", "roof"],
    ["was", "carried", "stood", "fell", "lay", "became", "held", "supports", "covers", "remains"],
    ["slowly", "again", "here", "once", "there", "early", "late", "often", "never", "still"],
    ["old", "broken", "white", "heavy", "carved", "plain", "Roman", "narrow", "great", "lost"],
]
_TOKEN = re.compile(r" ?\w+|\s|[^\w\s]")


def word_tokens(text: str) -> EncodedText:
    """The text as words, each with the space before it."""
    found = list(_TOKEN.finditer(text))
    ids = tuple(crc32(match.group().encode()) for match in found)
    return EncodedText(text, ids, array("I", [match.start() for match in found]))


def sentence(random_: random.Random) -> str:
    """Five to forty words and a full stop."""
    words = [random_.choice(random_.choice(VOCABULARY)) for _ in range(random_.randint(5, 40))]
    return " ".join(words).capitalize() + random_.choice("...?!")


def sentences(num: int, seed: int) -> list[str]:
    random_ = random.Random(seed)
    return [sentence(random_) for _ in range(num)]


def paragraphs(num: int, seed: int) -> list[str]:
    random_ = random.Random(seed)
    return [" ".join(sentence(random_) for _ in range(random_.randint(1, 6))) for _ in range(num)]
