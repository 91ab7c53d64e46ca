"""Wilcoxon's signed-rank test (1945), exact: whether paired differences lie to one side of zero, and how far.

It asks nothing of the noise but symmetry, and one stalled request among twelve moves it by one rank: times on shared
machines have such. Ties share their mean rank, which makes the test a little conservative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from statistics import median

MIN_PAIRS = 8
"""With fewer, no outcome at all has a probability below one in a hundred."""


@dataclass(frozen=True, slots=True)
class SignedRank:
    """`shift` is the median of the mean of every two differences (Hodges and Lehmann 1963), with its interval."""

    num_pairs: int
    p_value: float
    """Two-sided: how often differences without a side come out as far to one as these."""
    shift: float
    low: float
    high: float

    @property
    def is_beyond_noise(self) -> bool:
        """Whether zero lies outside the interval."""
        return not self.low <= 0.0 <= self.high


def signed_rank(differences: Sequence[float], alpha: float = 0.01) -> SignedRank:
    """The test, and the interval that misses the truth with probability `alpha` at most, of `MIN_PAIRS` or more."""
    n = len(differences)
    if n < MIN_PAIRS:
        raise ValueError(f"{n} differences; at least {MIN_PAIRS} are needed")
    walsh = sorted((a + b) / 2 for a, b in combinations_with_replacement(differences, 2))
    # The statistic is the number of these means that lie above zero; a mean at zero counts half to each side.
    above = sum(mean > 0 for mean in walsh) + sum(mean == 0 for mean in walsh) / 2
    cumulative = _cumulative(n)
    tail = int(min(above, len(walsh) - above) + 0.5)  # halves are rounded towards the middle
    num_cut = 0
    while 2 * cumulative[num_cut] <= alpha:
        num_cut += 1
    low, high = walsh[num_cut - 1], walsh[-num_cut]
    return SignedRank(n, min(1.0, 2 * cumulative[tail]), median(walsh), low, high)


def _cumulative(n: int) -> list[float]:
    """Probability that the sum of a random half of the ranks 1 … n is at most 0, 1, 2, …"""
    counts = [1] + [0] * (n * (n + 1) // 2)
    for rank in range(1, n + 1):
        for total in range(len(counts) - 1, rank - 1, -1):
            counts[total] += counts[total - rank]
    running, sums = 0, []
    for count in counts:
        running += count
        sums.append(running / 2**n)
    return sums
