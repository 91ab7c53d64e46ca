"""Prompts say what is wrong with them, with numbers."""

from __future__ import annotations

import pytest

from spolia_core.errors import InvalidRequest
from spolia_core.prompt import Part, Prompt, check_answer_length


def refusal(prompt: Prompt, vocab_size: int = 100, max_context_tokens: int = 10) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        prompt.validate(vocab_size=vocab_size, max_context_tokens=max_context_tokens)
    return caught.value


def test_tokens_are_those_of_the_parts_in_order() -> None:
    prompt = Prompt((Part((1, 2)), Part((3,), b"c" * 32), Part((4, 5))))
    assert prompt.token_ids == [1, 2, 3, 4, 5]
    assert prompt.num_tokens == 5
    prompt.validate(vocab_size=6, max_context_tokens=6)


def test_an_empty_prompt_is_refused() -> None:
    assert refusal(Prompt(())).field == "parts"


def test_an_empty_part_is_refused_by_index() -> None:
    assert refusal(Prompt((Part((1,)), Part((2,)), Part(())))).field == "parts[2].token_ids"


@pytest.mark.parametrize("bad", [-1, 100, 2**40])
def test_an_id_outside_the_vocabulary_is_refused_with_both_numbers(bad: int) -> None:
    error = refusal(Prompt((Part((0, 99)), Part((5, bad, 6)))))
    assert error.field == "parts[1].token_ids"
    assert (error.limit, error.actual) == ("0 … 99", str(bad))
    assert str(bad) in error.message


@pytest.mark.parametrize(("num_tokens", "fits"), [(8, True), (9, True), (10, False), (11, False)])
def test_a_prompt_must_leave_room_for_a_token(num_tokens: int, fits: bool) -> None:
    prompt = Prompt.live([1] * num_tokens)
    if fits:
        prompt.validate(vocab_size=100, max_context_tokens=10)
    else:
        error = refusal(prompt)
        assert (error.field, error.limit, error.actual) == ("parts", "10 tokens", f"{num_tokens} tokens")


def test_an_answer_must_fit_behind_the_prompt() -> None:
    check_answer_length(6, 4, 10)
    with pytest.raises(InvalidRequest) as caught:
        check_answer_length(6, 5, 10)
    assert (caught.value.field, caught.value.limit, caught.value.actual) == (
        "sampling.max_tokens",
        "4 behind this prompt",
        "5",
    )
    assert all(number in caught.value.message for number in ("6", "5", "10"))
