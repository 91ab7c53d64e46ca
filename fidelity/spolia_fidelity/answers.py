"""Generated answers against accepted ones: normalisation, exact match and token F1 as SQuAD scores them.

Source: Rajpurkar et al., SQuAD (EMNLP 2016), §6.1: punctuation and the articles a, an, the are ignored, case too.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from spolia_core.errors import InvalidRequest

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def is_exact(text: str, answers: Sequence[str]) -> bool:
    """Whether `text` equals one of the accepted `answers` after normalisation."""
    return normalise(text) in {normalise(answer) for answer in _any(answers)}


def best_f1(text: str, answers: Sequence[str]) -> float:
    """The highest token F1 of `text` against one of the accepted `answers`, in [0, 1]."""
    return max(_f1(normalise(text).split(), normalise(answer).split()) for answer in _any(answers))


def first_line(text: str) -> str:
    """What counts of a generated answer: its first line with anything on it."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _f1(words: list[str], accepted: list[str]) -> float:
    if not words or not accepted:
        return float(words == accepted)
    num_common = (Counter(words) & Counter(accepted)).total()
    return 2 * num_common / (len(words) + len(accepted))


def _any(answers: Sequence[str]) -> Sequence[str]:
    if not answers:
        raise InvalidRequest("no accepted answer to compare with", field="answers", limit="≥ 1", actual="0")
    return answers
