"""`spolia bench start`, one cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from quick_run import DEMO, run


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="resident memory is read from /proc")
def test_a_run_of_one_start_has_every_figure(tmp_path: Path) -> None:
    record = run(tmp_path, "spolia_bench.start", "--model", str(DEMO), "--rounds", "1", "--json")
    assert 0 < record["up_ready_s"] < record["up_first_answer_s"]
    assert record["join_s"] > 0
    roles = ("gateway", "kvstore", "prefill", "decode")
    assert all(record[f"{role}_rss_mib"] > 20 for role in roles)
    assert record["model_mib"] == pytest.approx(2.7, abs=0.1)
