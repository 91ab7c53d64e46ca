"""The README's figures are those of the result files beside it: a new run that is not told there fails here."""

from __future__ import annotations

import json
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
README = " ".join((ROOT / "README.md").read_text().split())


def result_of(name: str) -> dict[str, Any]:
    result = json.loads((ROOT / "bench/results" / f"{name}.json").read_text())
    assert isinstance(result, dict)
    return result


def rounded(figure: float, unit: str) -> Decimal:
    """Half up, as a reader rounds 1.595, and not as the nearest binary fraction of it does."""
    return Decimal(str(figure)).quantize(Decimal(unit), ROUND_HALF_UP)


def missing(*told: str) -> list[str]:
    """Those that the README does not say."""
    return [text for text in told if text not in README]


def test_the_first_figure_and_the_table_of_reuse() -> None:
    r = result_of("reuse-cpu")
    ratios = {
        way: r[f"ratio_full_over_{way}"] for way in ("prefix", "linked_cold", "linked", "linked_remote", "linked_disk")
    }
    told = [
        f"{r['ttft_linked_ms']:.0f} ms instead of {r['ttft_full_ms'] / 1000:.1f} s, {ratios['linked']:.1f} × sooner",
        f"| EXACT, nothing known | {r['ttft_full_ms']:.0f} ms |",
        f"| {r['ttft_prefix_ms']:.0f} ms | 33 | 0 | 4,096 | {ratios['prefix']:.1f} |",
        f"| {r['ttft_linked_cold_ms']:.0f} ms | 4,001 | 128 | 0 | {ratios['linked_cold']:.1f} |",
        f"| **{r['ttft_linked_ms']:.0f} ms** | 33 | 128 | 3,968 | **{ratios['linked']:.1f}** |",
        f"| {r['ttft_linked_remote_ms']:.0f} ms | 33 | 128 | 3,968 | {ratios['linked_remote']:.1f} |",
        f"| {r['ttft_linked_disk_ms']:.0f} ms | 33 | 128 | 3,968 | {ratios['linked_disk']:.1f} |",
        f"| transformers' own prefill, no server | {r['ttft_transformers_ms']:.0f} ms |",
        f"LINKED takes {rounded(r['ttft_over_floor'], '.01')} × the hardware's floor",
        f"TTFT grows {r['growth_8_to_32']:.1f} ×",
        f"get {r['loop_linked_requests_per_s']:.1f} answers/s, against {r['loop_prefix_requests_per_s']:.2f} with "
        f"exact prefix reuse only ({r['throughput_ratio_vs_prefix']:.1f} ×)",
        f"commit `{r['environment']['commit']}`",
    ]
    assert missing(*told) == []


def test_what_decoding_together_saves() -> None:
    r = result_of("shared-cpu")
    told = [
        f"decode {r['ratio_shared_over_private_16k']:.1f} times as fast when they attend them together",
        f"{r['ratio_shared_over_fused_private_16k']:.1f} times as fast as by torch's",
        f"{r['ratio_vs_transformers_32']:.0f} times as fast as transformers does",
        f"one sequence alone decodes {r['ratio_vs_transformers_1']:.1f} times as fast as there",
        f"the same documents cost {100 * (r['ratio_permuted_over_prefix_k0'] - 1):.0f} % more than a common prefix",
    ]
    assert missing(*told) == []


def test_what_survives_and_what_a_lookup_takes() -> None:
    chaos, store = result_of("store-chaos-cpu"), result_of("store-cpu")
    assert {
        chaos[name] for name in ("lost", "corrupt", "leaked_pins", "leaked_claims", "leaked_transfers", "stuck")
    } == {0}
    told = [
        f"Of {chaos['acked']:,} objects acknowledged as on disk none was lost",
        f"({chaos['evicted_by_policy']:,} were evicted",
        f"takes {store['lookup_p50_us_sqlite_1m'] / 1000:.1f} ms among a million entries, "
        f"{rounded(store['lookup_p99_sqlite_ratio_1m_over_1k'], '.1')} × as long at the 99th percentile",
    ]
    assert missing(*told) == []


def test_what_a_replay_found_again() -> None:
    r = result_of("replay-agentic-cpu")
    found, ideal = 100 * r["hit_rate"], 100 * r["ideal_hit_rate"]
    assert (
        missing(
            f"({r['requests']} requests, tokens", f"found {found:.1f} % of its prompt tokens again", f"{ideal:.1f} %"
        )
        == []
    )
