"""Trace files: JSON lines, gzipped or not.

mooncake   a request a line: `timestamp` (ms), `input_length`, `output_length`, `hash_ids` (one per started block)
agentic    a session a line: `block_size`, `requests` with `t` (s from the session's start), `in`, `out` and `hash_ids`
           (one per full block, meaningful in this session only); a request of type "subagent" holds requests of its
           own, whose `t` counts from the subagent's start. Sessions have no common clock: they are started
           `session_gap_s` apart.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from spolia_bench.replay.trace import Trace, TraceRequest

MOONCAKE_BLOCK_TOKENS = 512


class BadTrace(ValueError):
    """A file that is not what it was said to be; names the line."""


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a text file that may be gzipped."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        yield from file


def parse_mooncake(lines: Iterable[str], block_tokens: int = MOONCAKE_BLOCK_TOKENS) -> Trace:
    """All ids share one scope. Raises `BadTrace`."""
    requests = [
        TraceRequest(
            record["timestamp"] / 1000,
            record["input_length"],
            record["output_length"],
            tuple((0, block) for block in record["hash_ids"]),
        )
        for record in _records(lines, ("timestamp", "input_length", "output_length", "hash_ids"))
    ]
    return Trace(block_tokens, _by_arrival(requests))


def parse_agentic(lines: Iterable[str], session_gap_s: float) -> Trace:
    """Every session is a scope. Raises `BadTrace`, also where sessions have blocks of different sizes."""
    requests: list[TraceRequest] = []
    sizes: set[int] = set()
    for number, session in enumerate(_records(lines, ("block_size", "requests"))):
        sizes.add(session["block_size"])
        requests += _requests_of(session["requests"], number, number * session_gap_s, str(number))
    if len(sizes) > 1:
        raise BadTrace(f"sessions with blocks of {sorted(sizes)} tokens in one file")
    return Trace(sizes.pop() if sizes else 1, _by_arrival(requests))


def _requests_of(records: Sequence[dict[str, Any]], scope: int, start_s: float, session: str) -> Iterator[TraceRequest]:
    for number, record in enumerate(records):
        at_s = start_s + record["t"]
        if record["type"] == "subagent":
            yield from _requests_of(record["requests"], scope, at_s, f"{session}.{number}")
        elif record["in"] > 0:
            blocks = tuple((scope, block) for block in record["hash_ids"])
            yield TraceRequest(at_s, record["in"], record["out"], blocks, session)


def _records(lines: Iterable[str], fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise BadTrace(f"line {number} is no JSON: {error}") from error
        missing = [name for name in fields if not isinstance(record, dict) or name not in record]
        if missing:
            raise BadTrace(f"line {number} has no {', '.join(missing)}")
        yield record


def _by_arrival(requests: Iterable[TraceRequest]) -> tuple[TraceRequest, ...]:
    return tuple(sorted(requests, key=lambda request: request.at_s))
