"""`spolia bench structured`, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quick_run import run


@pytest.mark.slow
def test_a_quick_run_of_structured_steps_has_every_figure(tmp_path: Path) -> None:
    sizes = ["--vocabulary", "1000", "--rows", "1", "3", "--steps", "2"]
    record = run(tmp_path, "spolia_bench.structured", "--quick", "--json", *sizes, "--out", "out.json")
    names = ("none", "a_string_in_JSON", "objects_of_numbers", "any_JSON_object", "regex_letters")
    figures = ("mask_ms", "draw_ms", "step_ms", "step_ratio")
    expected = {f"{figure}_{name}_1001_{rows}" for figure in figures for name in names for rows in (1, 3)}
    assert expected <= record.keys()
    assert all(record[f"step_ratio_none_1001_{rows}"] == 1.0 for rows in (1, 3))
    assert json.loads((tmp_path / "out.json").read_text()) == record
