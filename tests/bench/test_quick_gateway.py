"""`spolia bench gateway`, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quick_run import DEMO, run


@pytest.mark.slow
def test_a_quick_gateway_run_has_every_figure(tmp_path: Path) -> None:
    """Each answer's length is checked, so that it ends well says that every way was gone."""
    tokenizer = str(DEMO)
    record = run(tmp_path, "spolia_bench.gateway", "--quick", "--json", "--tokenizer", tokenizer, "--out", "out.json")
    for streams in (1, 4):
        for way in ("", "grpc_"):
            for name in ("ttft_overhead", "token_overhead", "ttft_added", "token_added"):
                low, high = record[f"{way}{name}_ms_{streams}_interval"]
                assert low <= record[f"{way}{name}_ms_{streams}"] <= high
            assert record[f"{way}ttft_added_ms_{streams}"] > 0
        assert record[f"engine_ttft_ms_{streams}"] > 0
    for way in ("", "grpc_"):
        for name in ("ttft_overhead", "token_overhead", "ttft_added", "token_added"):
            low, high = record[f"{way}{name}_ms_4_steady_interval"]
            assert low <= record[f"{way}{name}_ms_4_steady"] <= high
    for way in ("engine", "grpc", "http"):
        assert 2 <= record[f"{way}_answers_4_steady"] <= 2 * 4 * 4, "rounds, streams, answers in a row"
        assert record[f"{way}_ttft_ms_4_steady"] > 0
    assert "ttft_overhead_ms_1_steady" not in record
    assert json.loads((tmp_path / "out.json").read_text()) == record
