"""Who asks for which documents: popular ones often, in any order."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence


def zipf_weights(num_items: int, exponent: float) -> tuple[float, ...]:
    """Weight 1 / (i + 1) ** exponent of item i; 0 makes all alike."""
    return tuple((index + 1) ** -exponent for index in range(num_items))


def choose_without_repeats(weights: Sequence[float], count: int, rng: random.Random) -> list[int]:
    """`count` different indices: each drawn by the weights of those that are left, then shuffled.

    Shuffled, because what is drawn first is popular: unshuffled, an exact prefix would be found more often than chance
    has it.
    """
    left = list(range(len(weights)))
    chosen = []
    for _ in range(count):
        index = rng.choices(left, [weights[i] for i in left])[0]
        left.remove(index)
        chosen.append(index)
    rng.shuffle(chosen)
    return chosen


def choices(num_items: int, exponent: float, count: int, seed: str) -> Iterator[list[int]]:
    """Endless choices of `count` among `num_items`, the same for the same seed."""
    rng, weights = random.Random(seed), zipf_weights(num_items, exponent)
    while True:
        yield choose_without_repeats(weights, count, rng)
