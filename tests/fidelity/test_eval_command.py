"""Laws of `spolia eval`: one deterministic JSON line, and nothing loaded for a request that is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness_worlds import one_json, without_times
from input_worlds import musique_record, nq_record, write

from spolia.cli.main import main as spolia
from spolia_bench.models import LLAMA_TINY, random_model
from spolia_core.errors import InvalidRequest, NotSupported
from spolia_fidelity import session
from spolia_fidelity.evaluate import DEFAULT_POLICIES, main
from spolia_fidelity.options import QUICK_CONTEXTS, QUICK_QUESTIONS, Options, add_options, parsed

SMALL = ("--chunks", "2", "--chunk-tokens", "320", "--questions", "12", "--threads", "1")


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded for a request that is wrong")

    monkeypatch.setattr(session.ModelAdapter, "load", refuse)


def test_json_is_one_line_and_the_same_for_a_seed(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", str(model), "--policies", "naive,link:8,cacheblend:0.16", "--json", *SMALL]
    assert main(argv) == 0
    first = one_json(capfd)
    assert main(argv) == 0
    second = one_json(capfd)
    assert main([*argv, "--seed", "1"]) == 0
    other = one_json(capfd)
    assert without_times(first) == without_times(second)
    assert without_times(first) != without_times(other)
    assert [policy["name"] for policy in first["policies"]] == ["full", "naive", "link:8", "cacheblend:0.16"]
    assert first["run"]["options"]["threads"] == 1
    assert sum(task["num_questions"] for task in first["policies"][0]["tasks"]) == 12


def test_a_model_that_cannot_do_a_task_has_no_loss_there(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(["--model", str(model), "--policies", "naive", "--json", *SMALL])
    result = one_json(capfd)
    assert any("cannot do the task fact" in note for note in result["notes"])
    for policy in result["policies"]:
        assert all(task["loss_points"] is None for task in policy["tasks"])
        assert policy["overall"]["nll_increase"]["value"] is not None


def test_answers_can_be_generated_for_models_that_do_not_know_the_form(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    main(["--model", str(model), "--policies", "naive", "--json", "--generate", *SMALL])
    result = one_json(capfd)
    assert result["run"]["options"]["generate"] is True
    assert any("cannot do the task fact" in note for note in result["notes"])


def test_text_files_are_measured_and_questions_can_be_left_out(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    book = tmp_path / "book.txt"
    book.write_text("The sea was calm and nobody spoke of the ship again. " * 60)
    argv = ["--model", str(model), "--policies", "naive,prefix", "--text", str(book), "--contexts", "3", "--json"]
    assert main([*argv, *SMALL, "--questions", "0"]) == 0
    result = one_json(capfd)
    assert [(found["name"], found["num_cases"]) for found in result["inputs"]] == [("book.txt", 3)]
    assert [task["task"] for task in result["policies"][0]["tasks"]] == ["book"]


def test_files_named_like_tasks_or_like_each_other_are_measured_apart(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    files = [tmp_path / "fact.txt", tmp_path / "book.txt", tmp_path / "other" / "book.txt"]
    for file in files:
        file.write_text("The sea was calm and nobody spoke of the ship again. " * 60)
    argv = ["--model", str(model), "--policies", "naive", "--contexts", "1", "--json", "--text", *map(str, files)]
    assert main([*argv, *SMALL]) == 0
    result = one_json(capfd)
    assert [info["name"] for info in result["inputs"]] == ["synthetic", "fact.txt", "book.txt", "book.txt-2"]
    num_questions = {task["task"]: task["num_questions"] for task in result["policies"][0]["tasks"]}
    assert [num_questions[task] for task in ("fact.txt", "book", "book.txt-2")] == [1, 1, 1]
    assert "fact" in num_questions
    with pytest.raises(InvalidRequest, match="given twice"):
        main([*argv, "--qa", str(files[0])])


def test_passages_are_cut_where_that_is_asked_for(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "mus.json", [musique_record(0)])
    argv = ["--model", str(model), "--policies", "naive", "--questions", "0", "--json", "--qa", str(file)]
    assert main([*argv, "--passage-tokens", "16"]) == 0
    (info,) = one_json(capfd)["inputs"]
    assert (info["num_chunks"], info["num_chunk_tokens"]) == (3, 48)


def test_contexts_of_records_with_one_passage_have_as_many_chunks_as_asked_for(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "nq.jsonl", [nq_record(index) for index in range(6)])
    argv = ["--model", str(model), "--policies", "naive", "--questions", "0", "--json", "--qa", str(file)]
    assert main([*argv, "--chunks", "3"]) == 0
    (info,) = one_json(capfd)["inputs"]
    assert (info["num_cases"], info["num_chunks"]) == (2, 6)


def test_cacheblend_on_a_single_layer_is_refused_before_any_text_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("texts were made for a policy that the model cannot have")

    monkeypatch.setattr(session, "case_sets", refuse)
    path = random_model(replace(LLAMA_TINY, layers=1), 0, cache=tmp_path)
    with pytest.raises(NotSupported, match=r"cacheblend:0\.16 measures how far layer 1 deviates"):
        main(["--model", str(path), "--policies", "naive,cacheblend:0.16", *SMALL])
    with pytest.raises(AssertionError):
        main(["--model", str(path), "--policies", "naive", *SMALL])


def test_a_report_is_written(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", str(model), "--policies", "naive", "--report", str(tmp_path / "report"), *SMALL]
    assert main(argv) == 0
    shown = capfd.readouterr()
    assert "naive" in shown.out
    assert shown.err == ""  # no progress where nobody looks
    names = {path.suffix for path in (tmp_path / "report").iterdir()}
    assert {".md", ".svg"} <= names


def test_a_report_that_cannot_be_written_does_not_cost_what_was_found(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.md").mkdir()  # in the way of the file
    with pytest.raises(InvalidRequest, match="cannot write a report"):
        main(["--model", str(model), "--policies", "naive", "--json", "--report", str(tmp_path), *SMALL])
    assert one_json(capfd)["kind"] == "spolia-eval"


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("argv", "field"),
    [
        (["--policies", "full,magic"], "policies"),
        (["--questions", "-1"], "questions"),
        (["--questions", "0"], "questions"),
        (["--chunks", "0"], "chunks"),
        (["--passage-tokens", "0"], "passage-tokens"),
        (["--threads", "0"], "threads"),
        (["--seed", "-1"], "seed"),
        (["--text", "nowhere.txt"], "text or qa"),
        (["--report", "/proc/report"], "report"),
    ],
)
def test_wrong_requests_are_refused_before_the_model_is_loaded(model: Path, argv: list[str], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        main(["--model", str(model), *argv])
    assert refused.value.field == field


@pytest.mark.parametrize("size", ["1", "200", "2000"])
def test_chunks_that_generated_texts_cannot_make_are_refused_before_anything_runs(
    model: Path, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("policies ran on chunks of another size than asked for")

    monkeypatch.setattr(session.Runner, "run", refuse)
    with pytest.raises(InvalidRequest, match=f"--chunk-tokens {size}: generated parts would have") as refused:
        main(["--model", str(model), *SMALL, "--chunk-tokens", size])
    least, most = map(int, refused.value.limit.removeprefix("about ").split(" to "))
    assert 250 < least < 350 < 1100 < most < 1300  # with one token per byte
    for reachable in (least, most):
        with pytest.raises(AssertionError):
            main(["--model", str(model), *SMALL, "--chunk-tokens", str(reachable)])


@pytest.mark.usefixtures("nothing_loads")
def test_the_command_ends_with_2_and_names_the_policy(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        spolia(["eval", "--model", str(model), "--policies", "full,magic"])
    assert ended.value.code == 2
    assert "'magic'" in capfd.readouterr().err


def test_help_is_the_harness_own(capfd: pytest.CaptureFixture[str]) -> None:
    for command, flag in (("eval", "--report"), ("calibrate", "--max-task-loss")):
        with pytest.raises(SystemExit) as ended:
            spolia([command, "--help"])
        assert ended.value.code == 0
        assert flag in capfd.readouterr().out


def test_quick_asks_little_and_says_so(model: Path) -> None:
    import argparse

    def options(*argv: str) -> Options:
        parser = argparse.ArgumentParser()
        add_options(parser)
        return parsed(parser, ["--model", str(model), *argv])[1]

    quick = options("--quick")
    assert (quick.num_questions, quick.max_contexts) == (QUICK_QUESTIONS, QUICK_CONTEXTS)
    assert quick.described()["quick"] is True
    assert options("--quick", "--questions", "7").num_questions == 7  # what was asked for goes first
    assert options().num_questions >= 2_000
    assert "full" in DEFAULT_POLICIES
