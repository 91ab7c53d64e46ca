"""Text becomes contexts of equal chunks that are cut from its own token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from input_worlds import DATA, word_encoder, words, write

from spolia_core.errors import InvalidRequest
from spolia_fidelity.case import check_cases
from spolia_fidelity.case_set import CaseSet
from spolia_fidelity.encoder import TextEncoder
from spolia_fidelity.inputs import InputOptions, load_cases
from spolia_fidelity.inputs.text_file import _sections

ENCODER = word_encoder()
SIZES: dict[str, Any] = {"max_context_tokens": 64, "text_chunks": 3, "text_chunk_tokens": 4, "text_scored_tokens": 5}


def load(path: Path, content: Any, **options: Any) -> CaseSet:
    return load_cases(write(path, content), ENCODER, InputOptions(**{**SIZES, **options}))


def test_a_context_is_consecutive_tokens_and_the_continuation_goes_on_where_it_ends(tmp_path: Path) -> None:
    found = load(tmp_path / "a.txt", words(20))
    (case,) = found.cases
    ids = ENCODER.encode(words(17))
    assert case.preamble_ids == (1,)
    assert case.chunks == (ids[0:4], ids[4:8], ids[8:12])
    (question,) = case.questions
    assert (question.token_ids, question.answer_ids) == (ids[12:13], ids[13:17])
    assert (question.task, question.exact, question.answers) == ("a", False, ())
    assert found.info.num_scored_tokens == 4


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.json", "a", "a.md"])
def test_packing_and_format_do_not_change_the_cases(tmp_path: Path, name: str) -> None:
    content: Any = [{"title": "t", "text": words(60)}] if ".json" in name else words(60)
    found = load(tmp_path / name, content)
    assert [case.chunks for case in found.cases] == [case.chunks for case in load(tmp_path / "a.txt", words(60)).cases]
    assert {question.task for case in found.cases for question in case.questions} == {"a"}


def test_no_context_crosses_from_one_text_into_another(tmp_path: Path) -> None:
    texts = [{"text": words(20, start=0)}, {"text": words(20, start=1000)}]
    for case in load(tmp_path / "a.jsonl", texts).cases:
        ids = [token for chunk in case.chunks for token in chunk]
        assert max(ids) - min(ids) < 20


def test_sections_together_are_the_text_and_end_before_white_space() -> None:
    text = words(500)
    sections = list(_sections(text, 97))
    assert "".join(sections) == text
    assert all(section.startswith(" ") for section in sections[1:])
    assert "".join(_sections("x" * 500, 97)) == "x" * 500


def test_a_limit_draws_contexts_from_all_over_the_text_by_its_seed(tmp_path: Path) -> None:
    text = words(3000)
    every = load(tmp_path / "a.txt", text)
    few = load(tmp_path / "a.txt", text, max_cases=6, seed=1)
    assert len(few.cases) == 6 < len(every.cases)
    assert {case.chunks for case in few.cases} <= {case.chunks for case in every.cases}
    assert [case.chunks for case in few.cases] != [case.chunks for case in every.cases[:6]]
    assert load(tmp_path / "a.txt", text, max_cases=6, seed=1) == few
    assert load(tmp_path / "a.txt", text, max_cases=6, seed=2).cases != few.cases


def test_a_context_larger_than_the_models_is_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        load(tmp_path / "a.txt", words(20), max_context_tokens=17)
    assert (caught.value.limit, caught.value.actual) == ("17 tokens", "18 tokens")
    load(tmp_path / "a.txt", words(20), max_context_tokens=18)


def test_a_text_too_short_for_one_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no 17 tokens in a row"):
        load(tmp_path / "a.txt", words(16))


def test_a_record_without_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="record 1: text"):
        load(tmp_path / "a.jsonl", [{"text": "w1"}, {"title": "w2"}])


@pytest.mark.skipif(not DATA.is_dir(), reason="the data files are not beside the project")
@pytest.mark.parametrize(
    "name", ["tinystories_sample.txt.gz", "wikitext2_valid.txt.gz", "classic_books_train.jsonl.gz"]
)
def test_the_published_texts_are_read(name: str) -> None:
    encoder = TextEncoder.from_model(Path(__file__).resolve().parents[2] / "models" / "demo")
    found = load_cases(DATA / "text" / name, encoder, InputOptions(max_context_tokens=8192, max_cases=12))
    check_cases(found.cases, vocab_size=3072, max_context_tokens=8192)
    assert len(found.cases) == 12
    assert {len(chunk) for case in found.cases for chunk in case.chunks} == {128}
