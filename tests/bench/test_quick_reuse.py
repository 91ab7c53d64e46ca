"""`spolia bench reuse`, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quick_run import DEMO, run


@pytest.mark.slow
def test_a_quick_reuse_run_has_every_figure(tmp_path: Path) -> None:
    """Each row checks its own sources and bytes, so that it ends well says that every path was taken."""
    demo = str(DEMO)
    record = run(tmp_path, "spolia_bench.reuse", "--quick", "--json", "--demo-model", demo, "--out", "out.json")
    expected = {
        "ratio_full_over_linked",
        "ratio_full_over_linked_remote",
        "ratio_full_over_linked_disk",
        "floor_ms",
        "ttft_over_floor",
        "floor_wire_mb_per_s",
        "linked_remote_over_linked_and_wire",
        "growth_8_to_12",
        "throughput_ratio_vs_prefix",
        "loop_linked_ttft_p99_ms",
        "ttft_transformers_ms",
        "demo_ttft_linked_ms",
        "demo_nll_increase_nats",
    }
    assert expected <= record.keys()
    assert record["floor_ms"] > 0
    assert record["floor_wire_ms"] > 0
    assert record["setup"]["quick"] is True
    assert {"cpu", "commit"} <= record["environment"].keys()
    assert json.loads((tmp_path / "out.json").read_text()) == record
