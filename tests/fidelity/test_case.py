"""Cases say what is wrong with them, by name, before a model sees them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spolia_core.errors import InvalidRequest
from spolia_fidelity.case import Case, Question, check_cases

QUESTION = Question("fact", (7, 8), (9, 1), exact=True)
CASE = Case("c0", (0,), ((2, 3, 4), (5, 6)), (QUESTION, replace(QUESTION, answer_ids=(9, 9, 1))))


def refusal(*cases: Case, vocab_size: int = 10, max_context_tokens: int = 11) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        check_cases(cases, vocab_size=vocab_size, max_context_tokens=max_context_tokens)
    return caught.value


def test_lengths_count_the_context_once_and_the_longest_question() -> None:
    assert (CASE.num_chunk_tokens, CASE.num_context_tokens, CASE.num_tokens) == (5, 6, 11)
    check_cases([CASE], vocab_size=10, max_context_tokens=11)


def test_a_case_stands_for_itself_unless_it_names_its_source() -> None:
    assert CASE.cluster_name == "c0"
    assert replace(CASE, cluster="story 3").cluster_name == "story 3"


@pytest.mark.parametrize(
    ("case", "field"),
    [
        (replace(CASE, chunks=()), "case 'c0': chunks"),
        (replace(CASE, chunks=((2,), ())), "case 'c0': chunks[1]"),
        (replace(CASE, chunks=((2,), (10,))), "case 'c0': chunks[1]"),
        (replace(CASE, preamble_ids=(-1,)), "case 'c0': preamble_ids"),
        (replace(CASE, questions=()), "case 'c0': questions"),
        (replace(CASE, questions=(replace(QUESTION, token_ids=()),)), "case 'c0': questions[0].token_ids"),
        (replace(CASE, questions=(QUESTION, replace(QUESTION, answer_ids=()))), "case 'c0': questions[1].answer_ids"),
        (replace(CASE, questions=(replace(QUESTION, task=""),)), "case 'c0': questions[0].task"),
    ],
)
def test_what_is_empty_or_out_of_range_is_named(case: Case, field: str) -> None:
    assert refusal(case).field == field


def test_a_context_that_does_not_fit_is_refused_with_both_numbers() -> None:
    error = refusal(CASE, max_context_tokens=10)
    assert (error.limit, error.actual) == ("10 tokens", "11 tokens")


def test_no_case_and_two_of_one_name_are_refused() -> None:
    assert refusal().field == "cases"
    assert "'c0'" in refusal(CASE, CASE).message


def test_a_model_without_bos_has_an_empty_preamble() -> None:
    check_cases([replace(CASE, preamble_ids=())], vocab_size=10, max_context_tokens=10)
