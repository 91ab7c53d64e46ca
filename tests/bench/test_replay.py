"""Traces: read, scaled, made into tokens, and what a perfect cache finds in them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from spolia_bench.replay.formats import BadTrace, parse_agentic, parse_mooncake, read_lines
from spolia_bench.replay.ideal import hit_rate, ideal_hits
from spolia_bench.replay.scale import first, scaled
from spolia_bench.replay.tokens import prompt_token_ids
from spolia_bench.replay.trace import Trace, TraceRequest


def mooncake(*requests: tuple[int, int, list[int]]) -> list[str]:
    return [
        json.dumps({"timestamp": at, "input_length": size, "output_length": 8, "hash_ids": ids})
        for at, size, ids in requests
    ]


def trace(*requests: tuple[int, tuple[int, ...]], block_tokens: int = 4) -> Trace:
    """(input tokens, block ids) each."""
    return Trace(
        block_tokens,
        tuple(TraceRequest(float(i), n, 1, tuple((0, b) for b in ids)) for i, (n, ids) in enumerate(requests)),
    )


SESSION = {
    "block_size": 64,
    "requests": [
        {"t": 0.0, "type": "n", "in": 130, "out": 9, "hash_ids": [1, 2]},
        {
            "t": 5.0,
            "type": "subagent",
            "requests": [{"t": 1.0, "type": "s", "in": 64, "out": 3, "hash_ids": [7]}],
        },
        {"t": 9.0, "type": "s", "in": 200, "out": 9, "hash_ids": [1, 2, 3]},
    ],
}


def test_mooncake_lines_become_requests_in_order_of_arrival() -> None:
    parsed = parse_mooncake(mooncake((2000, 700, [0, 1]), (500, 512, [0])))
    assert [r.at_s for r in parsed.requests] == [0.5, 2.0]
    assert parsed.block_tokens == 512
    assert parsed.requests[1].blocks == ((0, 0), (0, 1))
    assert parsed.requests[1].session is None


def test_agentic_sessions_share_no_blocks_and_start_apart() -> None:
    parsed = parse_agentic([json.dumps(SESSION)] * 2, session_gap_s=100.0)
    assert [r.at_s for r in parsed.requests] == [0.0, 6.0, 9.0, 100.0, 106.0, 109.0]
    assert not set(parsed.requests[0].blocks) & set(parsed.requests[3].blocks)


def test_a_subagent_is_a_session_of_its_own_in_the_scope_of_its_parent() -> None:
    parent, subagent, later = parse_agentic([json.dumps(SESSION)], 0.0).requests
    assert parent.session == later.session != subagent.session
    assert parent.blocks[0][0] == subagent.blocks[0][0]


@pytest.mark.parametrize("line", ["{", "[]", json.dumps({"timestamp": 1})])
def test_a_bad_line_is_named(line: str) -> None:
    with pytest.raises(BadTrace, match="line 2"):
        parse_mooncake([*mooncake((0, 5, [0])), line])


def test_gzipped_files_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(mooncake((0, 5, [0]), (1, 5, [0]))).encode()))
    assert len(parse_mooncake(read_lines(path)).requests) == 2


def test_scaling_keeps_which_prompts_share_which_blocks() -> None:
    given = parse_mooncake(mooncake((0, 1100, [0, 1, 2]), (1000, 1024, [0, 1])))
    small = scaled(given, token_factor=16, stretch=3.0, max_context_tokens=10_000)
    assert small.block_tokens == 32
    assert [r.num_input_tokens for r in small.requests] == [69, 64]
    assert [r.num_output_tokens for r in small.requests] == [1, 1]
    assert [r.at_s for r in small.requests] == [0.0, 3.0]
    assert [r.blocks for r in small.requests] == [r.blocks for r in given.requests]
    rates = [hit_rate(t, ideal_hits(t)) for t in (given, small)]
    assert rates[0] == pytest.approx(rates[1], abs=0.02)


def test_a_block_keeps_a_token_whatever_the_factor() -> None:
    small = scaled(trace((10, (1, 2))), token_factor=1000, stretch=1.0, max_context_tokens=100)
    assert small.block_tokens == 1
    assert small.requests[0].num_input_tokens == 3


def test_what_is_too_long_is_left_out_and_counted() -> None:
    small = scaled(trace((10, (1,)), (1000, (2,))), token_factor=1, stretch=1.0, max_context_tokens=20)
    assert (len(small.requests), small.num_left_out) == (1, 1)


def test_the_clock_of_a_part_starts_with_its_first_request() -> None:
    part = first(parse_mooncake(mooncake((5000, 5, [0]), (7000, 5, [0]), (9000, 5, [0]))), 2)
    assert [r.at_s for r in part.requests] == [0.0, 2.0]


def test_equal_blocks_are_equal_tokens_and_others_differ() -> None:
    given = trace((10, (1, 2, 3)), (12, (1, 2, 9)))
    one, other = (prompt_token_ids(r, i, 4, 256) for i, r in enumerate(given.requests))
    assert (len(one), len(other)) == (10, 12)
    assert one[:8] == other[:8]
    assert one[8:] != other[8:10]


def test_tokens_behind_the_blocks_are_the_requests_own() -> None:
    given = trace((8, (1,)), (8, (1,)))
    one, other = (prompt_token_ids(r, i, 4, 256) for i, r in enumerate(given.requests))
    assert one[:4] == other[:4]
    assert one[4:] != other[4:]


def test_the_ideal_finds_the_longest_prefix_seen_and_never_the_last_token() -> None:
    given = trace((12, (1, 2, 3)), (12, (1, 2, 9)), (8, (1, 2)), (8, (5, 2)))
    assert ideal_hits(given) == [0, 8, 7, 0]
    assert hit_rate(given, ideal_hits(given)) == 15 / 40


def test_a_partial_block_is_found_as_far_as_it_was_seen() -> None:
    assert ideal_hits(trace((6, (1, 2)), (12, (1, 2, 3)))) == [0, 6]


def test_a_cache_of_larger_blocks_finds_whole_ones_only() -> None:
    assert ideal_hits(trace((12, (1, 2, 3)), (12, (1, 2, 9))), granularity_tokens=5) == [0, 5]


def test_nothing_is_found_in_an_empty_trace() -> None:
    assert hit_rate(Trace(4, ()), []) == 0.0
