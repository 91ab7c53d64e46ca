"""The synthetic tasks have one right answer each, and it stands where the question says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from spolia_fidelity.tasks import PLAIN_STYLE, TASKS, Corpus, Question, make_corpus
from spolia_fidelity.tasks.names import is_held_out

_SEEDS = range(40)
_PERSON = re.compile(r"(?:kept by|harbour master is|captain is|friend of this person is) ([A-Z]\w+ [A-Z]\w+)")


@pytest.fixture(scope="module")
def corpora() -> list[Corpus]:
    return [make_corpus(seed, 8) for seed in _SEEDS]


def _questions(corpora: list[Corpus], task: str) -> list[tuple[Corpus, Question]]:
    found = [(corpus, question) for corpus in corpora for question in corpus.questions if question.task == task]
    assert len(found) > 20, f"too few questions of task {task} to say anything"
    return found


def test_equal_arguments_give_equal_corpora_and_seeds_differ() -> None:
    assert make_corpus(5, 6) == make_corpus(5, 6)
    assert make_corpus(5, 6) != make_corpus(6, 6)


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_stands_in_the_parts_its_question_names(corpora: list[Corpus], task: str) -> None:
    for corpus, question in _questions(corpora, task):
        last = corpus.parts[question.parts[-1]]
        assert question.answer.split(", ")[-1] in last
        if task == "two_hop":
            bridge = question.answer.split(", ")[0]
            assert bridge in corpus.parts[question.parts[0]]
            assert bridge in corpus.subjects[question.parts[1]]


@pytest.mark.parametrize("task", ["cut", "pronoun"])
def test_the_subject_of_a_crossing_question_stands_in_the_previous_part_only(corpora: list[Corpus], task: str) -> None:
    for corpus, question in _questions(corpora, task):
        before, after = question.parts
        assert after == before + 1
        asked = question.text.removeprefix("Question: ").split("?")[0]
        end = re.split(r"[.?] ", corpus.parts[before])[-1]
        named = [word for word in re.findall(r"[A-Z]\w+", end) if word in asked.split()[1:] or f"{word}" in asked]
        assert named, (end, asked)
        start = corpus.parts[after].split(".")[0]
        assert not any(word in start for word in named if word not in question.answer)
        assert start.startswith(" ")
        assert not corpus.parts[before].endswith("\n")


def test_a_text_is_asked_once_or_has_one_answer(corpora: list[Corpus]) -> None:
    for corpus in corpora:
        answers: dict[str, set[str]] = {}
        for question in corpus.questions:
            answers.setdefault(question.text, set()).add(question.answer)
        assert all(len(found) == 1 for found in answers.values())


@pytest.mark.parametrize("held_out", [True, False])
def test_training_and_evaluation_share_no_name(held_out: bool) -> None:
    """Of every pool: what texts are about, and who and what facts name."""
    seen = set()
    for seed in _SEEDS:
        corpus = make_corpus(seed, 8, held_out=held_out)
        names = [(_pool(subject), subject.removeprefix("the ").removesuffix(" School")) for subject in corpus.subjects]
        names += [("value", name) for part in corpus.parts for name in _PERSON.findall(part)]
        wrong = [name for _, name in names if is_held_out(name) != held_out]
        assert not wrong
        seen.update(pool for pool, _ in names)
    assert seen == {"inn", "ship", "school", "person", "place or castle", "value"}


def _pool(subject: str) -> str:
    if subject.startswith("the "):
        return "inn" if " " in subject.removeprefix("the ") else "ship"
    if subject.endswith(" School"):
        return "school"
    return "person" if " " in subject else "place or castle"


def test_parts_have_about_128_tokens_of_the_demo_model() -> None:
    tokenizer = Tokenizer.from_file(str(Path(__file__).parents[2] / "models" / "demo" / "tokenizer.json"))
    parts = [part for seed in _SEEDS for part in make_corpus(seed, 8).parts]
    sizes = [len(encoding.ids) for encoding in tokenizer.encode_batch(parts, add_special_tokens=False)]
    assert min(sizes) >= 100
    assert max(sizes) <= 160
    assert 120 <= sum(sizes) / len(sizes) <= 136


def test_without_cuts_and_bridges_every_part_stands_alone() -> None:
    style = replace(PLAIN_STYLE, cuts=0.0, bridges=0.0)
    for seed in _SEEDS:
        corpus = make_corpus(seed, 4, style=style)
        assert all(part.endswith("\n") for part in corpus.parts)
        assert {question.task for question in corpus.questions} == {"fact"}
