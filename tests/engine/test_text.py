"""Text as it comes equals text decoded at once, and ends where a stop string begins."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_worlds import STORIES, needs_stories
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_worlds import TEXTS, Tokenized, byte_level, sentence_piece, tokenized

from spolia_core.errors import NotFound
from spolia_engine.text import REPLACEMENT, IncrementalText, load_decode


def stream(case: Tokenized, stop: tuple[str, ...] = ()) -> tuple[list[str], IncrementalText]:
    """Pieces of text by token, the last one from `finish`."""
    text = IncrementalText(case.decode, stop)
    pieces = []
    for token_id in case.ids:
        text.add(token_id)
        pieces.append(text.take())
        if text.stopped:
            break
    return [*pieces, text.finish()], text


@given(tokenized())
@settings(max_examples=400, deadline=None)
@example(sentence_piece("😀😀é", [], [True]))
@example(sentence_piece("a b", [1, 2], [], specials=[2]))
@example(byte_level("a😀b".encode(), [2, 3]))
def test_the_pieces_are_the_text_decoded_at_once(case: Tokenized) -> None:
    pieces, text = stream(case)
    assert "".join(pieces) == case.text == text.emitted
    assert text.num_emitted == len(case.text)


@given(tokenized())
@settings(max_examples=200, deadline=None)
def test_half_a_character_is_never_given_out(case: Tokenized) -> None:
    pieces, _ = stream(case)
    assert not any(REPLACEMENT in piece for piece in pieces)


@given(tokenized())
@settings(max_examples=200, deadline=None)
def test_whole_characters_are_not_held_back(case: Tokenized) -> None:
    text = IncrementalText(case.decode)
    for count, token_id in enumerate(case.ids, 1):
        text.add(token_id)
        text.take()
        # At least: byte tokens of one run decode to replacement characters together while the last is unfinished.
        assert len(text.emitted) >= len(case.decode(case.ids[:count]).rstrip(REPLACEMENT))
        assert case.text.startswith(text.emitted)


@given(st.binary(max_size=24), st.lists(st.integers(0, 200), max_size=30))
@settings(max_examples=300, deadline=None)
def test_bytes_that_are_no_text_become_replacement_characters(data: bytes, cuts: list[int]) -> None:
    case = byte_level(data, cuts)
    pieces, _ = stream(case)
    assert "".join(pieces) == case.text


def test_an_unfinished_character_is_released_at_the_end() -> None:
    pieces, _ = stream(byte_level("ab😀".encode()[:-1], [2, 3]))
    assert pieces == ["ab", "", "", REPLACEMENT]


def test_text_before_an_unfinished_character_in_one_token_is_given_out() -> None:
    pieces, _ = stream(byte_level("abé".encode(), [3]))
    assert pieces == ["ab", "é", ""]


# Stop strings


def first_to_appear(full: str, stop: tuple[str, ...]) -> str:
    """Character by character: the text before the first stop string to be complete, the longest if several are."""
    for end in range(1, len(full) + 1):
        starts = [end - len(text) for text in stop if full[:end].endswith(text)]
        if starts:
            return full[: min(starts)]
    return full


STOPS = st.lists(
    st.text(st.sampled_from([*"ab .\n", "\u00e9", "中", "😀"]), min_size=1, max_size=4), min_size=1, max_size=3
)


@given(TEXTS, st.lists(st.integers(0, 200), max_size=30), STOPS, st.booleans())
@settings(max_examples=600, deadline=None)
@example("xabcd", [], ["cd", "abcd", "bc"], True)
def test_text_ends_before_the_first_stop_string_wherever_tokens_end(
    full: str, cuts: list[int], stops: list[str], as_byte_level: bool
) -> None:
    stop = tuple(stops)
    case = byte_level(full.encode(), cuts) if as_byte_level else sentence_piece(full, cuts, [])
    pieces, text = stream(case, stop)
    assert "".join(pieces) == first_to_appear(case.text, stop)
    assert text.stopped == (first_to_appear(case.text, stop) != case.text)


@given(TEXTS, st.lists(st.integers(0, 200), max_size=30), STOPS)
@settings(max_examples=200, deadline=None)
def test_no_token_is_taken_behind_the_one_that_completes_a_stop_string(
    full: str, cuts: list[int], stops: list[str]
) -> None:
    case = byte_level(full.encode(), cuts)
    pieces, text = stream(case, tuple(stops))
    used = len(pieces) - 1
    if text.stopped:
        before = case.decode(case.ids[: used - 1]).rstrip(REPLACEMENT)
        assert not any(stop in before for stop in stops)


def test_what_might_begin_a_stop_string_is_held_back_and_released() -> None:
    pieces, text = stream(byte_level(b"one ENx two EN", [4, 5, 6, 7, 12, 13]), ("END",))
    assert pieces == ["one ", "", "", "ENx", " two ", "", "", "EN"]
    assert not text.stopped


def test_a_stop_string_across_tokens_ends_the_text() -> None:
    pieces, text = stream(byte_level(b"one END two", [5, 6]), ("END",))
    assert pieces == ["one ", "", "", ""]
    assert text.stopped
    with pytest.raises(AssertionError, match="no tokens after"):
        text.add(0)


# Replay


@given(tokenized(), STOPS, st.integers(0, 100))
@settings(max_examples=300, deadline=None)
def test_a_replay_goes_on_behind_what_was_given_out(case: Tokenized, stops: list[str], cut: int) -> None:
    stop = tuple(stops)
    pieces, whole = stream(case, stop)
    used = case.ids[: len(pieces) - 1]
    given = "".join(pieces[: cut % (len(used) + 1)])
    text = IncrementalText(case.decode, stop)
    text.skip(len(given))
    found = given
    for token_id in used:
        text.add(token_id)
        found += text.take()
    assert found + text.finish() == whole.emitted == text.emitted


# Real tokenizers


def test_a_directory_without_a_tokenizer_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"tokenizer\.json"):
        load_decode(tmp_path)


@needs_stories
@given(st.lists(st.integers(0, 511), max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_ids_of_a_real_tokenizer_give_text_without_a_tear(ids: list[int]) -> None:
    decode = load_decode(STORIES)
    case = Tokenized(ids, decode)
    pieces, text = stream(case)
    assert "".join(pieces) == text.emitted
    if REPLACEMENT not in case.text:  # else later bytes may take back what an earlier byte had spelt
        assert text.emitted == case.text
