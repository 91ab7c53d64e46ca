"""Reports say what the result says: the same figures in words, in JSON and in files."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_worlds import POLICIES, TASKS, result, without_intervals

from spolia_core.errors import InvalidRequest
from spolia_fidelity.estimate import Estimate
from spolia_fidelity.report import json_line, print_result, write_report
from spolia_fidelity.report.json_line import record_of
from spolia_fidelity.report.markdown import markdown_report
from spolia_fidelity.report.table import brief_summary, brief_tasks, f1_table, summary_table, task_table
from spolia_fidelity.report.words import duration, nats, points, share


def refuse_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def test_one_line_of_strict_json_holds_the_run_and_every_figure_with_its_interval() -> None:
    found = result()
    line = json_line(found)
    assert "\n" not in line
    record = json.loads(line, parse_constant=refuse_constant)
    assert (record["kind"], record["format"]) == ("spolia-eval", 1)
    assert record["run"]["seed"] == 7
    assert record["run"]["fingerprint"] == found.run.fingerprint
    assert record["run"]["environment"]["commit"] == "abcdef012345"
    assert [policy["name"] for policy in record["policies"]] == list(POLICIES)
    naive = record["policies"][1]
    assert naive["recomputed_share"] == 0.0
    loss = found.policies[1].tasks[1].loss_points
    assert loss is not None
    assert naive["tasks"][1]["loss_points"] == {"value": loss.value, "low": loss.low, "high": loss.high}
    assert [info["num_skipped"] for info in record["inputs"]] == [0, 148]


def test_an_interval_that_the_data_do_not_hold_is_null_not_nan() -> None:
    record = json.loads(json_line(without_intervals(result())), parse_constant=refuse_constant)
    assert record["policies"][1]["overall"]["nll_increase"]["low"] is None
    assert record["policies"][1]["overall"]["nll_increase"]["value"] > 0


def test_the_record_is_the_line() -> None:
    assert json.loads(json_line(result())) == record_of(result())


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (Estimate(0.01234, 0.01, 0.015), "+0.0123 [0.0100, 0.0150]"),
        (Estimate(-0.002, -0.003, 0.001), "-0.0020 [-0.0030, 0.0010]"),
        (Estimate(0.0, 0.0, 0.0), "0"),
        (Estimate(0.00001, -0.00001, 0.00002), "+0.0000 [0.0000, 0.0000]"),
        (Estimate(0.5, math.nan, math.nan), "+0.5000 [no interval]"),
    ],
)
def test_exactly_nothing_and_nearly_nothing_are_written_differently(estimate: Estimate, expected: str) -> None:
    assert nats(estimate) == expected


def test_units_are_those_of_the_words() -> None:
    assert points(Estimate(10.04, 8.0, 12.0)) == "+10.0 [8.0, 12.0]"
    assert share(Estimate(0.973, 0.96, 0.98)) == "97.3 [96.0, 98.0] %"
    assert points(None) == share(None) == "–"
    assert (duration(48.4), duration(362)) == ("48 s", "6 min 2 s")


def test_tables_have_a_row_for_each_policy_and_for_each_of_its_tasks() -> None:
    found = result(texts=["wiki"])
    assert [row[0] for row in summary_table(found).rows] == list(POLICIES)
    rows = task_table(found).rows
    assert [row[:2] for row in rows] == [(task, name) for task in (*TASKS, "wiki") for name in POLICIES]
    assert [row[4:] for row in rows if row[0] == "wiki"] == [("–", "–", "–")] * len(POLICIES)
    assert f1_table(found) is None


def test_brief_tables_fit_a_terminal_of_80_columns_uncut(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(result(texts=["wikitext2_valid"]))
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines()) <= 80
    assert "…" not in printed
    for table in (brief_summary(result()), brief_tasks(result())):
        for row in table.rows:
            assert all(cell.strip() in printed for cell in row)
    assert "The model cannot do the task mus." in printed


def test_brackets_are_printed_and_not_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(without_intervals(result()))
    assert "[no interval]" in capsys.readouterr().out


def test_plain_tables_align_names_left_and_figures_right() -> None:
    lines = summary_table(result()).plain().splitlines()
    assert lines[1].startswith("full ")
    assert len({len(line) for line in lines}) == 1


def test_the_report_names_what_was_measured_the_figures_the_notes_and_the_run() -> None:
    found = result(texts=["wiki"])
    text = markdown_report(found, "plot.svg")
    assert "2,002 questions behind 502 contexts" in text
    assert "(plot.svg)" in text
    for row in (*summary_table(found).rows, *task_table(found).rows):
        assert f"| {' | '.join(row)} |" in text
    for part in ("148 left out", "148 questions left out.", "The model cannot do the task mus.", "0123456789abcdef"):
        assert part in text
    for part in ("cpu: A processor", "commit: abcdef012345", "texts: a.txt, b.txt", "seed 7"):
        assert part in text
    assert "gpu" not in text  # there was none
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings[-4:] == ["## How to read it", "## Limits", "## Inputs", "## Run"]


def test_a_report_is_three_files_that_agree(tmp_path: Path) -> None:
    files = write_report(result(), tmp_path / "new" / "folder")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {"report.md", "loss.svg", "result.json"}
    assert json.loads(files.json.read_text()) == record_of(result())
    assert "(loss.svg)" in files.markdown.read_text()
    assert files.plot.read_text().startswith("<svg")
    write_report(result({"full": (1.0, 0.0)}), tmp_path / "new" / "folder")  # over the older one
    assert len(json.loads(files.json.read_text())["policies"]) == 1


def test_a_name_that_is_no_text_does_not_stop_a_report(tmp_path: Path) -> None:
    found = result()
    found = replace(found, run=replace(found.run, model=os.fsdecode(b"models/\xff")))
    files = write_report(found, tmp_path)
    assert "models/?" in files.markdown.read_text(encoding="utf-8")
    assert json.loads(files.json.read_text())["run"]["model"] == "models/?"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="cannot write a report"):
        write_report(result(), tmp_path / "file")
