"""What a request cost: OpenAI's counts, and where the prompt's KV came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from spolia.v1 import common_pb2
from spolia_core.reuse import ChunkKind, MissReason, ReuseMode, TokenSource

_COMPUTED = frozenset({TokenSource.COMPUTED, TokenSource.LINK, TokenSource.COMPILED})
MIXED = "mixed"


def usage_of(finishes: Sequence[common_pb2.Finish]) -> dict[str, Any]:
    """The `usage` of an answer to one prompt or several. Cached tokens are those whose KV nobody had to compute."""
    num_prompt = sum(finish.num_prompt_tokens for finish in finishes)
    num_generated = sum(finish.num_generated_tokens for finish in finishes)
    sources = Counter[int]()
    for finish in finishes:
        for count in finish.reuse.sources:
            sources[count.source] += count.num_tokens
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": sum(n for s, n in sources.items() if s not in _COMPUTED)},
        "spolia": _report(finishes, sources),
    }


def _report(finishes: Sequence[common_pb2.Finish], sources: Counter[int]) -> dict[str, Any]:
    reports = [finish.reuse for finish in finishes]
    runs = reports[0].runs if len(reports) == 1 else ()
    return {
        "mode": _one_of({_name(ReuseMode, report.mode) for report in reports}),
        "profile": _one_of({report.profile for report in reports}),
        "forced": any(report.forced for report in reports),
        "link_tokens_per_chunk": max(report.link_tokens_per_chunk for report in reports),
        "sources": {_name(TokenSource, source): count for source, count in sorted(sources.items()) if count},
        "runs": [[_name(TokenSource, run.source), run.num_tokens] for run in runs],
        "misses": _misses(reports),
        "kv_bytes": {
            "chunks": sum(t.chunk_bytes for report in reports for t in report.transfers),
            "live": sum(t.live_bytes for report in reports for t in report.transfers),
            "inline": sum(t.inline_bytes for report in reports for t in report.transfers),
        },
        "nodes": list(dict.fromkeys(node for report in reports for node in report.nodes)),
        "seed": finishes[0].seed,
        "timings_ms": {
            "queue": round(max(finish.timings.queue_ms for finish in finishes), 3),
            "compute": round(sum(finish.timings.compute_ms for finish in finishes), 3),
            "ttft": round(max(finish.timings.ttft_ms for finish in finishes), 3),
            "e2e": round(max(finish.timings.e2e_ms for finish in finishes), 3),
        },
    }


def _misses(reports: Sequence[common_pb2.ReuseReport]) -> list[dict[str, Any]]:
    """Chunks wanted and not had, by kind and reason."""
    chunks, tokens = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for report in reports:
        for miss in report.misses:
            chunks[miss.kind, miss.reason] += 1
            tokens[miss.kind, miss.reason] += miss.num_tokens
    return [
        {
            "kind": _name(ChunkKind, kind),
            "reason": _name(MissReason, reason),
            "num_chunks": num_chunks,
            "num_tokens": tokens[kind, reason],
        }
        for (kind, reason), num_chunks in sorted(chunks.items())
    ]


def _one_of(values: set[str]) -> str:
    return values.pop() if len(values) == 1 else MIXED


def _name(kind: type[ReuseMode] | type[TokenSource] | type[ChunkKind] | type[MissReason], number: int) -> str:
    """In lower case. A newer node may send values that this release does not know."""
    try:
        return kind(number).name.lower()
    except ValueError:
        return f"unknown_{number}"
