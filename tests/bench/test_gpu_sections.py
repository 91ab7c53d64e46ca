"""`make gpu` without a device: its checks by the interpreter, what it says then, how it keeps its sections apart.
What the sections themselves do is in `test_gpu_figures.py`.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import gpu_section_worlds
import pytest
import torch

from spolia_bench.gpu import __main__ as gpu_main
from spolia_bench.gpu import crew, kernels, watched
from spolia_bench.gpu.__main__ import SECTIONS_S, main
from spolia_bench.gpu.batches import DEVICE
from spolia_bench.gpu.kernels import Check, check_one
from spolia_bench.gpu.run import Run
from spolia_bench.gpu.sections import OF_ATTENTION, measured_rates, sections
from spolia_bench.gpu.watched import END_S
from spolia_kernels import paged

PYTHON_S = 15
"""What a start of Python with torch takes, on a disk that has not read it yet."""
RATES = {"copy_tb_per_s": 1.0, "matrix_tflop_per_s": 100.0}
WHERE = {"gpu": "NVIDIA X", "commit": "0", "torch": "1", "transformers": "2"}
PAGE = """before
<!-- table: steps -->
| old |
<!-- end -->
<!-- table: linked -->
| old |
<!-- end -->
behind
"""
LIMIT_S = 120
"""Of what hangs: more than a start of its process ever takes. Nobody waits for most of it."""
LAST_S = 0.5
"""Of the limit, which passes as it does."""
without_device = pytest.mark.skipif(DEVICE == "cuda", reason="what a machine without a device does")


def clock(is_late: Callable[[], bool]) -> SimpleNamespace:
    """In the place of a module's `time`: real seconds, and all but the last of `LIMIT_S` more once `is_late()`."""
    return SimpleNamespace(monotonic=lambda: time.monotonic() + (LIMIT_S - LAST_S if is_late() else 0.0))


@without_device
def test_without_a_device_it_says_so_and_fails_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "no CUDA device: nothing checked"
    assert json.loads(said[-1])["device"] is None


def test_a_section_that_fails_leaves_the_others_their_results_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run({"device": "x"}, tmp_path / "results" / "gpu.json", time.monotonic() + 3 * LIMIT_S)
    monkeypatch.setattr(watched, "time", clock(lambda: "rates" in run.result))
    ended = [
        run.section("steps", gpu_section_worlds.raises, 60),
        run.section("linked", gpu_section_worlds.dies, 60),
        run.section("rates", gpu_section_worlds.hangs, LIMIT_S),
        run.section("attention", gpu_section_worlds.ends, 60),
        run.section("flex", gpu_section_worlds.flex, 60),
    ]
    assert ended == [False, False, False, True, True]
    saved = json.loads(run.path.read_text())
    assert saved["errors"] == {
        "steps": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "linked": "its process ended by itself, status 7",
        "rates": f"not ended after {LIMIT_S} s",
    }
    assert saved["steps"] == saved["linked"] == saved["rates"] == [{"point": "1x2"}]
    assert [row.get("flex_ms") for row in saved["attention"]] == [None, 9.0]
    run.deadline = 0.0
    assert not run.section("steps", gpu_section_worlds.ends, 20)
    assert run.result["errors"]["steps"] == "no time was left"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for a process where Linux lists them")
def test_what_a_section_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run({}, tmp_path / "gpu.json", time.monotonic() + 2 * LIMIT_S)
    monkeypatch.setattr(watched, "time", clock(lambda: "attention" in run.result))
    assert not run.section("flashinfer", gpu_section_worlds.starts_another, LIMIT_S)
    assert run.result["errors"] == {"flashinfer": f"not ended after {LIMIT_S} s"}
    (row,) = run.result["attention"]
    stat = Path(f"/proc/{row['pid']}/stat")
    deadline = time.monotonic() + 60
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_whole_is_bounded_and_every_section_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def section(run: Run, name: str, rows: object, seconds: float) -> bool:
        asked.append(name)
        if name == "rates":
            run.result["rates"] = [RATES]
        if name in ("steps", "linked"):
            run.result[name] = [{"model": "m", "point": "1x2", "shared_ms": 1.5, "linked_ms": 2.5}]
        if name == "steps":
            run.result["errors"] = {"steps": "no time was left"}
        return name != "steps"

    monkeypatch.setattr(Run, "section", section)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_main, "environment", lambda: WHERE)
    monkeypatch.setattr(gpu_main, "device_report", lambda: {"multiprocessors": 7, "triton": "3.6.0"})
    monkeypatch.setattr(gpu_main, "errors", lambda: [("a kernel", 0.0, 1e-3)])
    out, docs = tmp_path / "gpu.json", tmp_path / "gpu.md"
    docs.write_text(PAGE)
    options = ["--out", str(out), "--docs", str(docs)]
    assert main(options) == 1
    assert asked == ["rates", "steps", "linked", "engine", "sampling", "attention", "flashinfer", "flex"]
    assert list(SECTIONS_S) == asked[1:]
    said = capsys.readouterr().out
    assert '"multiprocessors": 7' in said
    assert "| m | 1 × 2 |" in said
    before, after = docs.read_text().split("<!-- table: linked -->")
    assert before == PAGE.split("<!-- table: linked -->")[0]  # a section that was cut short leaves its table alone
    assert "NVIDIA X (7 multiprocessors), bfloat16, torch 1, transformers 2, triton 3.6.0, commit `0`" in after
    assert "copies at 1.00 TB/s, products at 100 TFLOP/s" in after
    assert "| m | 1 × 2 |  | 2.5 |" in after
    assert after.endswith("<!-- end -->\nbehind\n")
    asked.clear()
    assert main([*options, "--only", "linked"]) == 0
    assert asked == ["rates", "linked"]
    assert main([*options, "--only", "kernels"]) == 0
    monkeypatch.setattr(gpu_main, "errors", lambda: [("a kernel", 1.0, 1e-3)])
    asked.clear()
    docs.write_text(PAGE)
    assert main(options) == 1
    assert asked == []
    assert docs.read_text() == PAGE
    assert json.loads(out.read_text())["kernels"][0]["error"] == 1.0
    assert "OFF" in capsys.readouterr().out
    assert gpu_main.TOTAL_S + END_S + PYTHON_S <= 8 * 60


def test_checks_that_do_not_end_are_off_and_nobody_waits_for_them() -> None:
    began = time.monotonic()
    found = kernels.errors_of([Check("sample", torch.float16)], 0.0)
    assert [(what, error) for what, error, _ in found] == [("sample float16: not ended after 0 s", math.inf)]
    assert time.monotonic() - began < 30


def test_all_checks_are_asked_for_and_what_takes_long_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Check] = []
    monkeypatch.setattr(kernels, "errors_of", lambda checks, seconds: asked.extend(checks) or [])
    assert kernels.errors() == []
    assert set(asked) == set(kernels.CHECKS)
    assert len(asked) == len(kernels.CHECKS)
    assert {(c.dtype, c.head_dim, c.tile) for c in asked[:2]} == {(torch.float32, 256, 64)}


def test_a_process_that_dies_loses_its_own_work_alone() -> None:
    began = time.monotonic()
    found = crew.answers(gpu_section_worlds.halved, [2, 7, 4, 6, 8], 2, 200)
    assert found == [1, crew.NoAnswer("its process ended by itself, status 3"), 2, 3, 4]
    assert time.monotonic() - began < 100


def test_a_process_that_hangs_is_ended_and_so_is_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    began, looks = time.monotonic(), count(1)
    # It looks as it begins, and before each wait: the third time behind the first answer, when the next item is given.
    monkeypatch.setattr(crew, "time", clock(lambda: next(looks) >= 3))
    found = crew.answers(gpu_section_worlds.halved, [2, 9, 4], 1, LIMIT_S)
    late = crew.NoAnswer(f"not ended after {LIMIT_S} s")
    assert found == [1, late, late]
    assert time.monotonic() - began < PYTHON_S + LAST_S + 2 * crew.END_S
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "check",
    [
        Check("attend", torch.float32),
        Check("append", torch.float16, 64),
        Check("paged", torch.float32, 64, 1, 16),
        Check("paged", torch.float16, 64, 8, 32),
    ],
    ids=str,
)
def test_every_kind_of_check_is_right_by_the_interpreter(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's side of each goes through Triton; bfloat16 the interpreter cannot multiply."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    before = torch.get_num_threads()
    monkeypatch.setattr(paged, "uses_triton", lambda tensor: True)
    what, error, limit = check_one(check)
    torch.set_num_threads(before)
    assert error <= limit, (what, error)
    assert check.kind == "attend" or error > 0  # the reference was not compared with itself


def test_a_check_that_cannot_run_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "KINDS", {"paged": lambda check: 1 / 0})
    what, error, limit = check_one(Check("paged", torch.float16, 64, 1, 16))
    assert "division by zero" in what
    assert error > limit


def test_the_grid_has_every_head_size_group_and_dtype() -> None:
    other_groups = {(torch.bfloat16, 128, group) for group in (2, 4, 7)}  # tails' tiles of other heights
    assert {(c.dtype, c.head_dim, c.group) for c in kernels.CHECKS if c.kind == "paged"} == other_groups | {
        (dtype, head_dim, group) for dtype in kernels.LIMITS for head_dim in (64, 128, 256) for group in (1, 8)
    }


def test_every_section_travels_to_a_process_of_its_own() -> None:
    for rows in (measured_rates, *sections(RATES, grid=True).values()):
        pickle.loads(pickle.dumps(rows))
    assert set(sections(RATES, grid=False)) > OF_ATTENTION


def test_what_a_section_lacks_is_that_section_s_error_alone(tmp_path: Path) -> None:
    run = Run({}, tmp_path / "gpu.json", time.monotonic() + 60)
    assert not run.section("linked", gpu_section_worlds.lacks_a_package, 20)
    assert run.result["errors"]["linked"] == "ModuleNotFoundError: No module named 'not_there'"
    lazily = "import sys, spolia_bench.gpu.__main__; sys.exit('spolia_engine.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", lazily], timeout=120).returncode == 0
