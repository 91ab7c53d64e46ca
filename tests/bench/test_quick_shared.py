"""`spolia bench shared`, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quick_run import run

from spolia_bench.shared.__main__ import main


@pytest.mark.slow
def test_a_quick_run_of_shared_steps_has_every_figure(tmp_path: Path) -> None:
    record = run(tmp_path, "spolia_bench.shared", "--quick", "--json", "--out", "out.json")
    ratios = {f"ratio_shared_over_private{tag}_{size}" for tag in ("", "_gqa7") for size in ("256", "1k")}
    ratios |= {"ratio_permuted_over_prefix_k0", "ratio_permuted_over_prefix_k16"}
    ratios |= {"ratio_vs_transformers_1", "ratio_vs_transformers_4"}
    ratios |= {"ratio_deterministic_1", "ratio_deterministic_4"}
    assert ratios | {f"{name}_interval" for name in ratios} <= record.keys()
    assert {"grid_worst_slowdown_low", "step_over_floor_1k", "step_over_floor_gqa7_1k"} <= record.keys()
    assert {"kv_bytes_over_distinct_tokens_k0", "kv_bytes_over_distinct_tokens_k16"} <= record.keys()
    ends = ("answered", "left", "busy", "deadline_exceeded")
    assert sum(record[f"storm_{end}"] for end in ends) == record["storm_requests"] == 40
    assert record["storm_unexpected"] == record["storm_held_blocks"] == record["storm_requests_left"] == 0
    assert 0 < record["storm_p50_itl_ms"] <= record["storm_p99_itl_ms"]
    for name in ratios:
        low, high = record[f"{name}_interval"]
        assert low <= record[name] <= high
    assert json.loads((tmp_path / "out.json").read_text()) == record


def test_the_measured_switch_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, which has loaded torch."""
    num_threads = torch.get_num_threads()
    assert main(["--quick", "--table", "--json"]) == 0
    torch.set_num_threads(num_threads)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"2x16", "64x1024"} <= record["llama-tiny"].keys()
    assert all(min(times) > 0 for times in record["qwen-tiny"].values())
