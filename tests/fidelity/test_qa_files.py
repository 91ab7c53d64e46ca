"""Every published layout is told by its fields and becomes cases whose passages are chunks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from input_worlds import BABI, DATA, hotpot_record, kv_record, musique_record, nq_record, word_encoder, words, write

from spolia_core.errors import InvalidRequest, NotFound
from spolia_fidelity.case import check_cases
from spolia_fidelity.case_set import CaseSet
from spolia_fidelity.encoder import TextEncoder
from spolia_fidelity.inputs import InputOptions, load_cases, source_names
from spolia_fidelity.result import ALL_TASKS
from spolia_fidelity.tasks.corpus import TASKS

ENCODER = word_encoder()


def load(path: Path, content: Any, **options: Any) -> CaseSet:
    found = load_cases(write(path, content), ENCODER, InputOptions(**{"max_context_tokens": 4096, **options}))
    check_cases(found.cases, vocab_size=3003, max_context_tokens=options.get("max_context_tokens", 4096))
    return found


def test_a_musique_record_is_a_case_with_a_chunk_for_each_passage(tmp_path: Path) -> None:
    found = load(tmp_path / "mus.json.gz", [musique_record(0), musique_record(1)])
    assert (found.info.layout, found.info.num_cases, found.info.num_chunks, found.info.num_skipped) == (
        "musique",
        2,
        6,
        0,
    )
    case = found.cases[1]
    assert (case.name, case.preamble_ids, [len(chunk) for chunk in case.chunks]) == ("mus/1", (1,), [20, 20, 20])
    assert case.chunks[0] == ENCODER.encode(musique_record(1)["ctxs"][0]["text"])
    (question,) = case.questions
    assert question.task == "mus"
    assert question.answer_ids == (*ENCODER.encode("w1 w2"), 2)  # the first accepted answer, then end of sequence
    assert (question.exact, question.answers) == (False, ("w1 w2", "w3"))


def test_a_hotpotqa_passage_is_its_title_and_sentences(tmp_path: Path) -> None:
    found = load(tmp_path / "hot.json", [hotpot_record(5)])
    (case,) = found.cases
    assert found.info.layout == "hotpotqa"
    assert [len(chunk) for chunk in case.chunks] == [11] * 4
    assert case.chunks[0][0] == ENCODER.encode("w5")[0]
    assert case.questions[0].answers == ("w3",)


def test_questions_of_one_nq_context_share_it_and_their_passages_distract_each_other(tmp_path: Path) -> None:
    records = [nq_record(index) for index in range(11)]
    found = load(tmp_path / "nq.jsonl.gz", records, num_passages=5)
    assert (found.info.layout, found.info.num_cases, found.info.num_questions) == ("nq-open", 2, 10)
    assert found.info.num_records == 11
    assert "1 left-over" in found.info.notes[0]
    for case in found.cases:
        assert len(case.chunks) == len(case.questions) == 5
        titles = [chunk[0] for chunk in case.chunks]
        assert [question.answer_ids[0] for question in case.questions] == titles  # every gold passage is there
    asked = {question.answer_ids for case in found.cases for question in case.questions}
    assert len(asked) == 10


def test_a_seed_fixes_which_nq_passages_stand_together(tmp_path: Path) -> None:
    records = [nq_record(index) for index in range(12)]
    path = tmp_path / "nq.jsonl"
    first = load(path, records, num_passages=4, seed=1)
    assert load(path, records, num_passages=4, seed=1) == first
    assert load(path, records, num_passages=4, seed=2).cases != first.cases


def test_a_passage_of_two_nq_records_stands_in_their_context_once(tmp_path: Path) -> None:
    twin = {**nq_record(0), "question": "w5 w6"}
    (case,) = load(tmp_path / "nq.jsonl", [nq_record(0), twin, nq_record(1)], num_passages=3).cases
    assert (len(case.chunks), len(case.questions)) == (2, 3)


def test_key_value_pairs_are_grouped_and_scored_without_generating(tmp_path: Path) -> None:
    found = load(tmp_path / "kv.jsonl", [kv_record(3)], pairs_per_chunk=3)
    (case,) = found.cases
    assert found.info.layout == "kv-retrieval"
    assert [len(chunk) for chunk in case.chunks] == [6, 6, 2]
    assert case.questions[0].exact
    assert case.questions[0].answers == ()
    assert case.questions[0].answer_ids == (*ENCODER.encode("w3"), 2)


def test_a_babi_question_sees_the_sentences_before_it_and_its_story_is_one_cluster(tmp_path: Path) -> None:
    record = {"file": "qa1_single_test.txt", "text": BABI}
    found = load(tmp_path / "babi.jsonl", [record], sentences_per_chunk=1)
    assert [case.name for case in found.cases] == [f"babi/qa1_single_test/{at}" for at in ("0@2", "0@3", "1@4")]
    assert [len(case.chunks) for case in found.cases] == [2, 3, 4]
    assert [len(case.questions) for case in found.cases] == [1, 2, 1]
    assert found.cases[0].chunks == found.cases[1].chunks[:2]
    assert found.cases[0].cluster_name == found.cases[1].cluster_name != found.cases[2].cluster_name
    assert (found.info.num_clusters, found.info.num_records) == (2, 4)
    assert {question.task for case in found.cases for question in case.questions} == {"babi/qa1"}


def test_babi_contexts_of_one_chunk_are_left_out_and_counted(tmp_path: Path) -> None:
    record = {"file": "qa1_single_test.txt", "text": BABI}
    found = load(tmp_path / "babi.jsonl", [record], sentences_per_chunk=2)
    assert [len(case.chunks) for case in found.cases] == [2, 2]
    assert found.info.notes == ("1 of 4 questions left out: asked before there is a second chunk.",)


def test_cases_that_do_not_fit_are_left_out_and_counted_never_cut(tmp_path: Path) -> None:
    records = [musique_record(0), musique_record(1, num_passages=30), musique_record(2)]
    found = load(tmp_path / "mus.json", records, max_context_tokens=100)
    assert [case.name for case in found.cases] == ["mus/0", "mus/2"]
    assert (found.info.num_records, found.info.num_skipped) == (3, 1)
    assert found.info.notes == ("1 questions left out: their context exceeds 100 tokens.",)


def test_when_nothing_fits_the_shortest_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="shortest has 68") as caught:
        load(tmp_path / "mus.json", [musique_record(0), musique_record(1, 4)], max_context_tokens=64)
    assert caught.value.limit == "64 tokens"


def test_cut_passages_are_said_to_be_cut(tmp_path: Path) -> None:
    found = load(tmp_path / "mus.json", [musique_record(0)], max_chunk_tokens=15)
    assert [len(chunk) for chunk in found.cases[0].chunks] == [15, 15, 15]
    assert "3 of 3 chunks cut to 15 tokens" in found.info.notes[0]


def test_a_limit_draws_cases_from_all_over_the_file_and_says_so(tmp_path: Path) -> None:
    records = [musique_record(index) for index in range(20)]
    found = load(tmp_path / "mus.json", records, max_cases=5, seed=3)
    assert len(found.cases) == 5
    assert [case.name for case in found.cases] != [f"mus/{i}" for i in range(5)]
    assert found.info.notes == ("Stopped at 5 cases, drawn at random (seed 3).",)


def test_an_unknown_layout_is_refused_with_the_fields_seen(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="passage, query") as caught:
        load(tmp_path / "new.jsonl", [{"passage": "w1", "query": "w2"}])
    assert caught.value.actual == "passage, query"
    assert "ordered_kv_records" in caught.value.limit


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([musique_record(0), {**musique_record(1), "answers": []}], "record 1: answers"),
        ([{**musique_record(0), "ctxs": ["w1"]}], "record 0: not a passage"),
        ([{**hotpot_record(0), "context": [["w1", ["w2"], "w3"]]}], "record 0: not a pair"),
        ([nq_record(0), {"question": "w1"}], "record 1: ctxs"),
        ([kv_record(1), {**kv_record(1), "key": 7}], "record 1: key"),
        ([{"file": "qa1.txt", "text": "no number here"}], "qa1, line 1: not a numbered line"),
    ],
)
def test_a_record_that_breaks_its_layout_is_named(tmp_path: Path, records: list[Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        load(tmp_path / "bad.json", records)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.jsonl", b'{"text": "w1"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b"[1]\n", "line 1: not an object"),
        ("a.jsonl", b'{"text": "w1"}\n{"text": "w1 \\ud83d w2"}\n', "line 2: half of a surrogate pair"),
        ("a.json", b'[{"text": "w1 \\uDC00"}]', "line 1: half of a surrogate pair"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1: nested too deep"),
        ("a.json", b"[" * 100_000 + b"]" * 100_000, "line 1: nested too deep"),
        ("a.json", b'{"text": "w1"}', "not a list"),
        ("a.txt", b"  \n ", "is empty"),
        ("a.txt", b"w1 \xff w2", "not UTF-8 at byte 3"),
        ("a.txt.gz", b"\x1f\x8b\x08\x00broken", "not a whole gzip"),
        ("a.txt.gz", b"plain", "not a whole gzip"),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(InvalidRequest, match=message):
        load_cases(tmp_path / name, ENCODER, InputOptions(max_context_tokens=100))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_a_record_ends_at_its_line_feed_and_nowhere_else(tmp_path: Path, separator: str) -> None:
    text = json.dumps({**kv_record(1), "key": f"k1{separator}"}, ensure_ascii=False)
    (tmp_path / "kv.jsonl").write_bytes(f"{text}\r\n{json.dumps(kv_record(2))}\r\n".encode())
    found = load_cases(tmp_path / "kv.jsonl", ENCODER, InputOptions(max_context_tokens=100))
    assert found.info.num_records == 2


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "kv.jsonl").write_bytes(mark + json.dumps(kv_record(1)).encode())
    (tmp_path / "a.txt").write_bytes(mark + words(80).encode())
    options = InputOptions(max_context_tokens=100, text_chunks=2, text_chunk_tokens=4)
    assert load_cases(tmp_path / "kv.jsonl", ENCODER, options).info.layout == "kv-retrieval"
    assert load_cases(tmp_path / "a.txt", ENCODER, options).cases[0].chunks[0] == ENCODER.encode(words(4))


def test_a_pair_that_spells_one_character_is_text(tmp_path: Path) -> None:
    (tmp_path / "kv.jsonl").write_text(json.dumps({**kv_record(1), "value": "\U0001f600"}))
    assert load_cases(tmp_path / "kv.jsonl", ENCODER, InputOptions(max_context_tokens=100)).cases


def test_no_file_shares_a_name_or_a_task_with_another_or_with_what_is_generated() -> None:
    paths = ["fact.txt", "all.jsonl", "book.txt", "a/book.txt", "book.txt.gz", "book", "synthetic", "book.txt-2"]
    found = source_names([Path(path) for path in paths])
    assert [source.name for source in found[:3]] == ["fact.txt", "all.jsonl", "book.txt"]
    assert [source.task for source in found[:3]] == ["fact.txt", "all.jsonl", "book"]
    assert len({source.name for source in found}) == len({source.task for source in found}) == len(paths)
    assert not {source.task for source in found} & {*TASKS, ALL_TASKS}
    assert "synthetic" not in {source.name for source in found}
    assert not any("/" in source.task for source in found)  # a slash stands before a task within a file


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        load_cases(tmp_path / "none.jsonl", ENCODER, InputOptions(max_context_tokens=100))


def test_sizes_that_make_no_case_are_refused_by_name() -> None:
    for field in ("max_context_tokens", "num_passages", "text_chunks", "max_cases"):
        with pytest.raises(InvalidRequest) as caught:
            InputOptions(**{"max_context_tokens": 100, field: 0})
        assert caught.value.field == field


MODEL = Path(__file__).resolve().parents[2] / "models" / "demo"


@pytest.mark.skipif(not DATA.is_dir(), reason="the data files are not beside the project")
@pytest.mark.parametrize(
    ("name", "layout", "num_records"),
    [
        ("cacheblend_musique_s.json.gz", "musique", 150),
        ("hotpotqa_train100.json.gz", "hotpotqa", 100),
        ("nq_open_oracle.jsonl.gz", "nq-open", 2655),
        ("kv_retrieval_75keys_200.jsonl.gz", "kv-retrieval", 200),
        ("babi_en_1k.jsonl.gz", "babi", 40000),
    ],
)
def test_the_published_files_are_read(name: str, layout: str, num_records: int) -> None:
    options = InputOptions(max_context_tokens=8192, max_cases=10, max_chunk_tokens=512)
    found = load_cases(DATA / "qa" / name, TextEncoder.from_model(MODEL), options)
    check_cases(found.cases, vocab_size=3072, max_context_tokens=8192)
    assert (found.info.layout, found.info.num_records, len(found.cases)) == (layout, num_records, 10)
    assert all(len(case.chunks) >= 2 for case in found.cases)
