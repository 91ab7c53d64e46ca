"""A storm of short requests on a cluster whose decode node has memory for a tenth of them.

Some have four samples, some go away while they are answered, some have hardly any time. Each must end with its answer
or with an error that says why; when all is over nothing may be held.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from spolia import AsyncClient, Document, Part, SpoliaError
from spolia.connection import DEFAULT_MAX_MESSAGE_BYTES
from spolia.local_cluster import LocalCluster
from spolia.results import Node
from spolia_bench.frame import Report, Table, progress
from spolia_bench.models import Shape, random_model
from spolia_core.errors import Busy, DeadlineExceeded

DOCUMENTS = 16
DOCUMENT_CHARS = 64
MAX_QUESTION_CHARS = 48
MAX_TOKENS = 16
PATIENCE_S = 1800.0
SETTLE_S = 30.0
MIN_POOL_BYTES = 1 << 20
"""What a node takes at least; a storm of few requests on a tiny model has more than a tenth, then."""
EXPECTED = (Busy, DeadlineExceeded)


@dataclass(slots=True)
class Storm:
    """What became of the requests."""

    ended: Counter[str] = field(default_factory=Counter)
    said: Counter[str] = field(default_factory=Counter)
    """What errors said, numbers left out."""
    unexpected: list[str] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)
    """Between two tokens of a sample."""
    first_ms: list[float] = field(default_factory=list)
    num_tokens: int = 0
    seconds: float = 0.0
    held_blocks: int = 0
    num_left: int = 0
    """Requests that the decode node still counts when all have ended."""


def run_storm(num_requests: int, arrival_s: float, shape: Shape, seed: int) -> Storm:
    """Starts a cluster, lets the storm pass, whose requests come over `arrival_s`, and looks what is left."""
    model = random_model(shape, seed)
    # A token's KV, all layers, float32; a request's prompt and the answers of one sample in four of four.
    token_bytes = shape.layers * 2 * shape.width * shape.kv_heads // shape.heads * 4
    tokens = DOCUMENT_CHARS + MAX_QUESTION_CHARS // 2 + MAX_TOKENS
    pool_bytes = max(num_requests * tokens * token_bytes // 10, MIN_POOL_BYTES)
    # Memory is to be what binds, and the gateway's limit of requests under way is to be met too.
    env = {
        "SPOLIA_POOL_BYTES": str(pool_bytes),
        "SPOLIA_MAX_WAITING": str(num_requests),
        "SPOLIA_MAX_RUNNING": str(num_requests),
    }
    with LocalCluster(model, settings=["--log-level", "error"], env=env) as cluster:  # its engines share the cores
        return asyncio.run(_blow(cluster.address, num_requests, arrival_s, seed))


async def _blow(address: str, num_requests: int, arrival_s: float, seed: int) -> Storm:
    storm = Storm()
    began = time.monotonic()
    async with AsyncClient(address, timeout_s=PATIENCE_S, max_message_bytes=DEFAULT_MAX_MESSAGE_BYTES) as client:
        texts = [_text(random.Random(f"{seed} {d}"), DOCUMENT_CHARS) for d in range(DOCUMENTS)]
        await asyncio.gather(*(_one(client, storm, texts, arrival_s, seed, number) for number in range(num_requests)))
        storm.seconds = time.monotonic() - began
        node = await _settled(client)
    storm.held_blocks = node.referenced_blocks + node.in_transfer_blocks + node.lent_blocks
    storm.num_left = node.num_running + node.num_waiting
    return storm


async def _one(
    client: AsyncClient, storm: Storm, texts: Sequence[str], arrival_s: float, seed: int, number: int
) -> None:
    draw = random.Random(f"{seed} request {number}")
    await asyncio.sleep(draw.random() * arrival_s)
    documents: list[Part] = [Document(draw.choice(texts))]
    parts = [*documents, _text(draw, draw.randint(8, MAX_QUESTION_CHARS))]
    n = 4 if draw.random() < 0.25 else 1
    num_tokens = draw.randint(1, MAX_TOKENS)
    leaves_after = draw.randint(0, n * num_tokens - 1) if draw.random() < 0.15 else None
    timeout_s = draw.uniform(0.05, 5.0) if draw.random() < 0.15 else PATIENCE_S
    last: dict[int, float] = {}
    sent, received = time.monotonic(), 0
    try:
        async with client.stream(
            parts,
            mode=draw.choice(["exact", "linked"]),
            n=n,
            max_tokens=num_tokens,
            ignore_eos=True,
            temperature=draw.choice([0.0, 1.0]),
            seed=number,
            timeout_s=timeout_s,
        ) as stream:
            async for delta in stream:
                now = time.monotonic()
                if delta.token_ids:
                    if delta.sample_index in last:
                        storm.gaps_ms.append((now - last[delta.sample_index]) * 1e3)
                    elif not last:
                        storm.first_ms.append((now - sent) * 1e3)
                    last[delta.sample_index] = now
                received += len(delta.token_ids)
                if leaves_after is not None and received > leaves_after:
                    storm.ended["left"] += 1
                    return
        ended = "answered" if received == n * num_tokens else "cut short"
    except SpoliaError as error:
        ended = type(error).__name__
        storm.said[re.sub(r"\d+", "#", str(error))] += 1
        if not isinstance(error, EXPECTED):
            storm.unexpected.append(f"{number}: {error!r}")
    finally:
        storm.num_tokens += received
    storm.ended[ended] += 1


async def _settled(client: AsyncClient) -> Node:
    """The decode node's record once it says that nobody is there, or when it has had time enough to say so."""
    give_up = time.monotonic() + SETTLE_S
    while True:
        node = next(node for node in (await client.cluster()).nodes if node.role == "decode")
        held = node.num_running + node.num_waiting + node.referenced_blocks + node.in_transfer_blocks
        if not held or time.monotonic() > give_up:
            return node
        await asyncio.sleep(0.5)


def _text(draw: random.Random, num_chars: int) -> str:
    return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(num_chars))


def storm_section(report: Report, num_requests: int, arrival_s: float, shape: Shape, seed: int) -> None:
    """Adds the storm's figures and table."""
    storm = run_storm(num_requests, arrival_s, shape, seed)
    progress(f"storm of {num_requests}: {dict(storm.ended)} in {storm.seconds:.0f} s")
    for text, count in storm.said.most_common(8):
        progress(f"{count} × {text}")
    figures = {
        "storm_requests": num_requests,
        "storm_answered": storm.ended["answered"],
        "storm_left": storm.ended["left"],
        "storm_busy": storm.ended["Busy"],
        "storm_deadline_exceeded": storm.ended["DeadlineExceeded"],
        "storm_unexpected": len(storm.unexpected) + storm.ended["cut short"],
        "storm_held_blocks": storm.held_blocks,
        "storm_requests_left": storm.num_left,
        "storm_p50_itl_ms": _share(storm.gaps_ms, 0.5),
        "storm_p99_itl_ms": _share(storm.gaps_ms, 0.99),
        "storm_p50_ttft_ms": _share(storm.first_ms, 0.5),
        "storm_tokens_per_s": round(storm.num_tokens / storm.seconds, 1),
    }
    report.figures.update(figures)
    names = [name.removeprefix("storm_") for name in figures]
    report.tables.append(Table(names, [[str(value) for value in figures.values()]]))


def _share(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1) if ordered else 0.0
