"""Rounds in which every way answers the same questions, and what they add up to."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import torch

from spolia.local_cluster import LocalCluster
from spolia_bench.frame import Report, progress
from spolia_bench.gateway.options import Options
from spolia_bench.gateway.questions import Asked, Questions
from spolia_bench.gateway.timing import RoundTime
from spolia_bench.gateway.ways import Way, engine_alone, over_grpc, over_http
from spolia_bench.shared.pairs import difference
from spolia_decode.config import DecodeConfig
from spolia_engine.engine import Engine

_median = statistics.median
ALONE, GRPC, HTTP = "engine", "grpc", "http"
Times = dict[str, list[RoundTime]]


def measure(report: Report, model: Path, options: Options) -> None:
    """Fills the report for every number of streams."""
    torch.set_num_threads(options.threads)
    engine = Engine.load(model)
    # Alone and in the cluster, the same engine does the same: what is not asked about is off, or the same, in both.
    running = str(max(options.streams))
    settings = ["--log-level", "warning", "--decode.publish", "false", "--decode.max-running", running]
    config = DecodeConfig(model=str(model), publish=False, max_running=max(options.streams), log_level="warning")
    over = ("TTFT over alone", "token over alone", "TTFT over node's", "token over node's")
    report.header = ("streams", "way", "TTFT ms", "ms per token", *over)
    with LocalCluster(model, num_prefill=0, settings=settings, engine_threads=options.threads) as cluster:
        for num_streams, times in asyncio.run(_all(cluster, engine, config, model, options)).items():
            _tell(report, num_streams, times)


async def _all(
    cluster: LocalCluster, engine: Engine, config: DecodeConfig, model: Path, options: Options
) -> dict[int, Times]:
    questions = Questions(model, options.tokens, options.seed)
    async with AsyncExitStack() as stack:
        ways = {
            ALONE: await stack.enter_async_context(engine_alone(engine, config)),
            GRPC: await stack.enter_async_context(over_grpc(cluster.address)),
            HTTP: await stack.enter_async_context(over_http(cluster.http_address)),
        }
        found: dict[int, Times] = {}
        for num_streams in options.streams:
            found[num_streams] = await _rounds(ways, questions, num_streams, options.rounds)
            progress(f"{num_streams} streams: {options.rounds} rounds")
        return found


async def _rounds(ways: Mapping[str, Way], questions: Questions, num_streams: int, num_rounds: int) -> Times:
    """Each round begins with another way; the first round does not count."""
    names = list(ways)
    times: Times = {name: [] for name in names}
    for number in range(num_rounds + 1):
        at = number % len(names)
        asked = [questions.draw() for _ in range(num_streams)]
        for name in names[at:] + names[:at]:
            took = await _at_once(ways[name], asked)
            if number:
                times[name].append(took)
    return times


async def _at_once(way: Way, asked: list[Asked]) -> RoundTime:
    streams = await asyncio.gather(*(way(one) for one in asked))
    for stream, one in zip(streams, asked, strict=True):
        stream.check(one.num_tokens)
    return RoundTime.of(streams)


def _tell(report: Report, num_streams: int, times: Times) -> None:
    """HTTP's figures bear the plain names: it is the longer way. `overhead` is over the engine alone in the same round,
    `added` over what the decode node says of the same requests, which leaves out what all of it slows the engine by.
    """
    for way in times:
        found, alone = times[way], times[ALONE]
        ttft, token = _median([t.ttft_ms for t in found]), _median([t.token_ms for t in found])
        report.figures[f"{way}_ttft_ms_{num_streams}"] = round(ttft, 3)
        report.figures[f"{way}_token_ms_{num_streams}"] = round(token, 3)
        row = [str(num_streams), way, f"{ttft:.1f}", f"{token:.2f}"]
        if way != ALONE:
            over = {
                "ttft_overhead": difference([t.ttft_ms for t in found], [t.ttft_ms for t in alone]),
                "token_overhead": difference([t.token_ms for t in found], [t.token_ms for t in alone]),
                "ttft_added": difference([t.added_ttft_ms for t in found], [0.0] * len(found)),
                "token_added": difference([t.added_token_ms for t in found], [0.0] * len(found)),
            }
            for name, more in over.items():
                figure = f"{'' if way == HTTP else 'grpc_'}{name}_ms_{num_streams}"
                report.figures[figure] = round(more.median, 3)
                report.figures[f"{figure}_interval"] = [round(more.low, 3), round(more.high, 3)]
            row += [str(more) for more in over.values()]
        report.rows.append(row + [""] * (len(report.header) - len(row)))
