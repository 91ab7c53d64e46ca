"""`spolia bench replay`, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quick_run import run


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
