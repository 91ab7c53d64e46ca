"""Generated answers are compared as SQuAD compares them."""

from __future__ import annotations

import pytest

from spolia_core.errors import InvalidRequest
from spolia_fidelity.answers import best_f1, first_line, is_exact, normalise


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel Tower.", "eiffel tower"),
        ("an apple, a pear", "apple pear"),
        ("Theatre", "theatre"),
        ("U.S.A.", "usa"),
        (" the ", ""),
    ],
)
def test_case_punctuation_articles_and_spaces_do_not_count(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_one_accepted_answer_is_enough() -> None:
    assert is_exact("the Gerald Ford", ["President Gerald Ford", "gerald ford"])
    assert not is_exact("Gerald", ["Gerald Ford"])


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("Gerald Ford", ["Gerald Ford"], 1.0),
        ("Gerald", ["Gerald Ford"], 2 / 3),
        ("Gerald Gerald", ["Gerald Ford"], 0.5),
        ("Nixon", ["Gerald Ford"], 0.0),
        ("Gerald", ["Nixon", "Gerald R Ford"], 0.5),
        ("", ["Gerald Ford"], 0.0),
        ("the", ["a"], 1.0),
    ],
)
def test_f1_counts_common_words_with_the_best_accepted_answer(text: str, answers: list[str], expected: float) -> None:
    assert best_f1(text, answers) == pytest.approx(expected)


def test_only_the_first_line_with_anything_on_it_counts() -> None:
    assert first_line("\n  Gerald Ford \nQuestion: who") == "Gerald Ford"
    assert first_line(" \n") == ""


def test_without_an_accepted_answer_there_is_no_score() -> None:
    for compare in (is_exact, best_f1):
        with pytest.raises(InvalidRequest):
            compare("x", [])
