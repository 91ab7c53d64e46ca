"""An answer as it grows: how it ends, and that another node can go on with it anywhere."""

from __future__ import annotations

import pytest
from engine_worlds import letters
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizer_worlds import Tokenized, byte_level, tokenized

from spolia_core.errors import InvalidRequest
from spolia_core.reuse import FinishReason
from spolia_core.sampling import SamplingParams
from spolia_engine.generation import Delta, Generation
from spolia_engine.text import Decode

EOS = 999_999


def generate(generation: Generation, ids: list[int]) -> list[Delta]:
    """Deltas up to the end of the answer or of `ids`."""
    deltas = []
    for token_id in ids:
        if generation.finish_reason is not None:
            break
        deltas.append(generation.accept(token_id))
    return deltas


def new(decode: Decode, eos: bool = True, **params: object) -> Generation:
    return Generation(SamplingParams(**params), frozenset([EOS]) if eos else frozenset(), decode)  # type: ignore[arg-type]  # fields differ in type


def test_max_tokens_ends_an_answer_by_length() -> None:
    generation = new(letters, max_tokens=3)
    deltas = generate(generation, [1, 2, 3, 4])
    assert generation.finish_reason is FinishReason.LENGTH
    assert [d.token_ids for d in deltas] == [(1,), (2,), (3,)]
    assert generation.text == letters([1, 2, 3])


def test_eos_is_an_id_of_the_answer_but_no_text_of_it() -> None:
    generation = new(letters)
    generate(generation, [1, EOS, 2])
    assert generation.finish_reason is FinishReason.EOS
    assert generation.token_ids == [1, EOS]
    assert generation.text == letters([1])


def test_eos_may_be_ignored() -> None:
    generation = new(lambda ids: letters([i % 100 for i in ids]), ignore_eos=True, max_tokens=3)
    generate(generation, [1, EOS, 2])
    assert generation.finish_reason is FinishReason.LENGTH
    assert generation.token_ids == [1, EOS, 2]


def test_a_stop_string_ends_an_answer_before_it() -> None:
    case = byte_level(b"one END two", [4, 6, 8])
    generation = new(case.decode, stop=("END",))
    generate(generation, case.ids)
    assert generation.finish_reason is FinishReason.STOP
    assert generation.text == "one "
    assert len(generation.token_ids) == 3


@pytest.mark.parametrize("last", [None, EOS])
def test_the_end_releases_what_was_held_back(last: int | None) -> None:
    case = byte_level(b"one EN", [4])
    generation = new(case.decode, stop=("END",), max_tokens=2 if last is None else 9)
    deltas = generate(generation, case.ids + ([last] if last else []))
    assert "".join(d.text for d in deltas) == generation.text == "one EN"


@given(
    tokenized(), st.sampled_from([(), ("ab",), ("a", " ."), ("b\n", "中😀", "ba")]), st.booleans(), st.integers(1, 30)
)
@settings(max_examples=200, deadline=None)
def test_deltas_are_gapless(case: Tokenized, stop: tuple[str, ...], has_eos: bool, max_tokens: int) -> None:
    generation = new(case.decode, stop=stop, max_tokens=max_tokens)
    deltas = generate(generation, case.ids + [EOS] * has_eos)
    num_ids = num_text = 0
    for delta in deltas:
        assert (delta.token_index, delta.text_offset) == (num_ids, num_text)
        num_ids += len(delta.token_ids)
        num_text += len(delta.text)
    assert (num_ids, num_text) == (len(generation.token_ids), len(generation.text))


@given(
    case=tokenized(),
    stop=st.sampled_from([(), ("ab",), ("a", " ."), ("b\n", "中😀", "ba")]),
    has_eos=st.booleans(),
    max_tokens=st.integers(1, 30),
    cut=st.integers(0, 100),
    lost=st.integers(0, 3),
)
@settings(max_examples=500, deadline=None)
@example(case=byte_level(b"one ENx", [3, 4, 5, 6]), stop=("END",), has_eos=False, max_tokens=30, cut=4, lost=0)
def test_cut_anywhere_and_resumed_elsewhere_the_answer_is_the_same(
    case: Tokenized, stop: tuple[str, ...], has_eos: bool, max_tokens: int, cut: int, lost: int
) -> None:
    ids = case.ids + [EOS] * has_eos
    assume(ids)
    max_tokens = min(max_tokens, len(ids))
    whole = new(case.decode, stop=stop, max_tokens=max_tokens)
    deltas = generate(whole, ids)
    assert whole.finish_reason is not None
    received = deltas[: cut % (len(deltas) + 1)]
    had_ids = [i for d in received for i in d.token_ids]
    had_text = "".join(d.text for d in received)
    had_text = had_text[: max(0, len(had_text) - lost)]  # text may be behind the ids, never ahead of them

    second = new(case.decode, stop=stop, max_tokens=max_tokens)
    rest = second.resume(had_ids, len(had_text))
    assert (rest is None) == (second.finish_reason is None)
    later = [rest] if rest else generate(second, ids[len(had_ids) :])
    text, count = had_text, len(had_ids)
    for delta in later:
        assert (delta.token_index, delta.text_offset) == (count, len(text))
        count += len(delta.token_ids)
        text += delta.text
    assert (second.token_ids, second.text, second.finish_reason) == (whole.token_ids, whole.text, whole.finish_reason)
    assert text == whole.text


def test_ids_behind_the_end_of_the_answer_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"resume\.token_ids") as caught:
        new(letters).resume([1, EOS, 2], 0)
    assert (caught.value.limit, caught.value.actual) == ("2 ids", "3 ids")
