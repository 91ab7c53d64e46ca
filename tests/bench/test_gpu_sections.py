"""What `make gpu` runs where there is a device, here without one: its checks by the interpreter, its sections on shapes
small enough for a CPU, its word where there is no device.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import gpu_section_worlds
import pytest
import torch

from spolia_bench.gpu import __main__ as gpu_main
from spolia_bench.gpu import kernels
from spolia_bench.gpu.__main__ import main
from spolia_bench.gpu.batches import DEVICE, Heads, Point
from spolia_bench.gpu.flex import OutOfTime, Patience, flex
from spolia_bench.gpu.kernels import Check, check_one
from spolia_bench.gpu.linked import compare
from spolia_bench.gpu.rates import Rates
from spolia_bench.gpu.run import Run
from spolia_bench.gpu.steps import Shape
from spolia_bench.gpu.tables import tables
from spolia_bench.gpu.watched import END_S
from spolia_kernels import paged

without_device = pytest.mark.skipif(DEVICE == "cuda", reason="what a machine without a device does")


@without_device
def test_without_a_device_it_says_so_and_fails_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "no CUDA device: nothing checked"
    assert json.loads(said[-1])["device"] is None


def test_a_section_that_fails_leaves_the_others_their_results_and_says_why(tmp_path: Path) -> None:
    run = Run({"device": "x"}, tmp_path / "results" / "gpu.json", time.monotonic() + 150)
    ended = [
        run.section("steps", gpu_section_worlds.raises, 60),
        run.section("linked", gpu_section_worlds.dies, 60),
        run.section("rates", gpu_section_worlds.hangs, 6.0),
        run.section("attention", gpu_section_worlds.ends, 60),
        run.section("flex", gpu_section_worlds.flex, 60),
    ]
    assert ended == [False, False, False, True, True]
    saved = json.loads(run.path.read_text())
    assert saved["errors"] == {
        "steps": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "linked": "its process ended by itself, status 7",
        "rates": "not ended after 6 s",
    }
    assert saved["steps"] == saved["linked"] == saved["rates"] == [{"point": "1x2"}]
    assert [row.get("flex_ms") for row in saved["attention"]] == [None, 9.0]
    run.deadline = 0.0
    assert not run.section("steps", gpu_section_worlds.ends, 20)
    assert run.result["errors"]["steps"] == "no time was left"


def test_the_whole_is_bounded_and_every_section_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def section(run: Run, name: str, rows: object, seconds: float) -> bool:
        asked.append(name)
        if name == "rates":
            run.result["rates"] = [{"copy": 1e12, "matrix": 1e14}]
        return name != "steps"

    monkeypatch.setattr(Run, "section", section)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_main, "environment", lambda: {"gpu": "NVIDIA X", "commit": "0"})
    monkeypatch.setattr(gpu_main, "errors", lambda: [("a kernel", 0.0, 1e-3)])
    out = tmp_path / "gpu.json"
    assert main(["--out", str(out)]) == 1
    assert asked == ["rates", "steps", "linked", "attention", "flex"]
    asked.clear()
    assert main(["--out", str(out), "--only", "linked"]) == 0
    assert asked == ["rates", "linked"]
    assert main(["--out", str(out), "--only", "kernels"]) == 0
    monkeypatch.setattr(gpu_main, "errors", lambda: [("a kernel", 1.0, 1e-3)])
    asked.clear()
    assert main(["--out", str(out)]) == 1
    assert asked == []
    assert json.loads(out.read_text())["kernels"][0]["error"] == 1.0
    assert "OFF" in capsys.readouterr().out
    assert gpu_main.TOTAL_S + END_S <= 8 * 60


def test_checks_that_do_not_end_are_off_and_nobody_waits_for_them() -> None:
    began = time.monotonic()
    found = kernels.errors_of([Check("sample", torch.float16)], 0.0)
    assert [(what, error) for what, error, _ in found] == [("sample float16: not ended after 0 s", math.inf)]
    assert time.monotonic() - began < 30


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
    assert {(c.dtype, c.head_dim, c.group) for c in kernels.CHECKS if c.kind == "paged"} == {
        (dtype, head_dim, group) for dtype in kernels.LIMITS for head_dim in (64, 128, 256) for group in (1, 8)
    }


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("group", [1, 4])
def test_flex_attention_is_asked_for_what_rows_that_share_a_span_see(group: int) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    point, heads = Point(5, 40, 3), Heads(4, 4 // group, 16)
    asked: dict[str, torch.Tensor] = {}

    def recording(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: object) -> torch.Tensor:
        asked.update(query=query, key=key, value=value)
        found: torch.Tensor = flex_attention(query, key, value, **options)
        return found

    out = flex(point, heads, recording)()
    keys = torch.arange(40 + 5 * 4)
    for row in range(5):
        seen = (keys < 40) | ((keys - 40) // 4 == row)
        key, value = (asked[n][:, :, seen].repeat_interleave(group, 1).float() for n in ("key", "value"))
        expected = torch.nn.functional.scaled_dot_product_attention(
            asked["query"][:, :, row : row + 1].float(), key, value
        )
        torch.testing.assert_close(out[:, :, row : row + 1].float(), expected, atol=2e-2, rtol=2e-2)


def test_patience_ends() -> None:
    patience = Patience(0.0001)
    with patience.spent():
        sum(range(100_000))
    with pytest.raises(OutOfTime), patience.spent():
        raise AssertionError("not reached")


def test_a_linked_context_is_timed_by_the_engine_itself() -> None:
    shape = Shape("tiny", 2, 128, 96, Heads(2, 1, 64), 101)
    rows = list(compare(shape, Rates(1e12, 1e14), documents=3, tokens=64))
    assert [row["rows"] for row in rows] == [1 + 3 * 16 + 16]
    assert rows[0]["floor_ms"] > 0
    lines = list(tables({"linked": [replace_times(row) for row in rows]}))
    assert lines[2] == "| tiny | 3 × 64 | 65 | 2.0 | 4.0 | 1.0 | 2.00 | 2.00 |"


def replace_times(row: dict[str, object]) -> dict[str, object]:
    """The row with figures that are the same on every machine."""
    times = {"linked_ms": 2.0, "recompute_ms": 4.0, "floor_ms": 1.0}
    return {**row, **times, "recompute_over_linked": 2.0, "linked_over_floor": 2.0}
