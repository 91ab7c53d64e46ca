"""Seeded text of a given length: words nobody has written, so that nothing is cached by accident."""

from __future__ import annotations

import random

_STARTS = ("b", "br", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "v")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ou")


def text_of(num_bytes: int, rng: random.Random) -> str:
    """ASCII prose-like text of exactly `num_bytes`."""
    words: list[str] = []
    size = 0
    while size <= num_bytes:
        word = "".join(rng.choice(_STARTS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, 4)))
        words.append(word)
        size += len(word) + 1
    return " ".join(words)[: num_bytes - 1] + "."
