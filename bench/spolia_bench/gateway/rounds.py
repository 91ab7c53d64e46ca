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
    report.header = ("streams", "way", "TTFT ms", "more", "ms per token", "more")
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
    """HTTP's figures bear the plain names: it is the longer way."""
    figures = report.figures
    for way in (ALONE, GRPC, HTTP):
        ttft, token = ([getattr(t, field) for t in times[way]] for field in ("ttft_ms", "token_ms"))
        base_ttft, base_token = ([getattr(t, field) for t in times[ALONE]] for field in ("ttft_ms", "token_ms"))
        more_ttft, more_token = difference(ttft, base_ttft), difference(token, base_token)
        figures[f"{way}_ttft_ms_{num_streams}"] = round(statistics.median(ttft), 2)
        figures[f"{way}_token_ms_{num_streams}"] = round(statistics.median(token), 3)
        if way != ALONE:
            tag = "" if way == HTTP else "grpc_"
            for name, more in (("ttft", more_ttft), ("token", more_token)):
                figures[f"{tag}{name}_overhead_ms_{num_streams}"] = round(more.median, 3)
                figures[f"{tag}{name}_overhead_ms_{num_streams}_interval"] = [round(more.low, 3), round(more.high, 3)]
        shown = ("", "") if way == ALONE else (str(more_ttft), str(more_token))
        medians = (f"{statistics.median(ttft):.1f}", f"{statistics.median(token):.2f}")
        report.rows.append((str(num_streams), way, medians[0], shown[0], medians[1], shown[1]))
