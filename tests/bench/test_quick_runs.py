"""Benches, small, from the command line to the JSON line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


@pytest.mark.slow
def test_a_quick_reuse_run_has_every_figure(tmp_path: Path) -> None:
    """Each row checks its own sources and bytes, so that it ends well says that every path was taken."""
    demo = str(ROOT / "models" / "demo")
    record = run(tmp_path, "spolia_bench.reuse", "--quick", "--json", "--demo-model", demo, "--out", "out.json")
    expected = {
        "ratio_full_over_linked",
        "ratio_full_over_linked_remote",
        "ratio_full_over_linked_disk",
        "floor_ms",
        "ttft_over_floor",
        "growth_8_to_12",
        "throughput_ratio_vs_prefix",
        "loop_linked_ttft_p99_ms",
        "ttft_transformers_ms",
        "demo_ttft_linked_ms",
        "demo_nll_increase_nats",
    }
    assert expected <= record.keys()
    assert record["floor_ms"] > 0
    assert record["setup"]["quick"] is True
    assert {"cpu", "commit"} <= record["environment"].keys()
    assert json.loads((tmp_path / "out.json").read_text()) == record


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


@pytest.mark.slow
def test_a_quick_gateway_run_has_every_figure(tmp_path: Path) -> None:
    """Each answer's length is checked, so that it ends well says that every way was gone."""
    tokenizer = str(ROOT / "models" / "demo")
    record = run(tmp_path, "spolia_bench.gateway", "--quick", "--json", "--tokenizer", tokenizer, "--out", "out.json")
    for streams in (1, 4):
        for way in ("", "grpc_"):
            for name in ("ttft_overhead", "token_overhead", "ttft_added", "token_added"):
                low, high = record[f"{way}{name}_ms_{streams}_interval"]
                assert low <= record[f"{way}{name}_ms_{streams}"] <= high
            assert record[f"{way}ttft_added_ms_{streams}"] > 0
        assert record[f"engine_ttft_ms_{streams}"] > 0
    assert json.loads((tmp_path / "out.json").read_text()) == record


def test_the_measured_switch_is_printed(tmp_path: Path) -> None:
    record = run(tmp_path, "spolia_bench.shared", "--quick", "--table", "--json")
    assert {"2x16", "64x1024"} <= record["llama-tiny"].keys()
    assert all(min(times) > 0 for times in record["qwen-tiny"].values())


@pytest.mark.slow
def test_a_replay_finds_the_prefixes_that_are_there(tmp_path: Path) -> None:
    requests = [
        {"timestamp": 400 * i, "input_length": 1024, "output_length": 32, "hash_ids": [0, 1 + i % 2]} for i in range(4)
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join(json.dumps(request) for request in requests))
    flags = ["--trace", "trace.jsonl", "--kind", "mooncake", "--token-factor", "2", "--shape", "llama-tiny-random"]
    record = run(tmp_path, "spolia_bench.replay", *flags, "--stretch", "2", "--json")
    assert record["requests"] == 4
    assert record["failures"] == {}
    # 512 tokens each: nothing, a half, and twice all but the last block of the cache.
    assert record["ideal_hit_rate"] == round((256 + 511 + 511) / 2048, 4)
    assert record["ideal_hit_rate_in_prefix_chunks"] == round((256 + 384 + 384) / 2048, 4)
    assert record["hit_rate"] == pytest.approx(record["ideal_hit_rate_in_prefix_chunks"], abs=0.001)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="resident memory is read from /proc")
def test_a_run_of_one_start_has_every_figure(tmp_path: Path) -> None:
    record = run(tmp_path, "spolia_bench.start", "--model", str(ROOT / "models" / "demo"), "--rounds", "1", "--json")
    assert 0 < record["up_ready_s"] < record["up_first_answer_s"]
    assert record["join_s"] > 0
    roles = ("gateway", "kvstore", "prefill", "decode")
    assert all(record[f"{role}_rss_mib"] > 20 for role in roles)
    assert record["model_mib"] == pytest.approx(2.7, abs=0.1)


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
