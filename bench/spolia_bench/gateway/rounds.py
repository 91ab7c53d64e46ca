"""Rounds in which every way answers the same questions, and what they add up to.

Once all streams ask at the same instant (a burst), and then each asks again when it has been answered (`steady`).
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import torch

from spolia.local_cluster import LocalCluster
from spolia_bench.frame import Report, progress
from spolia_bench.gateway.options import Options
from spolia_bench.gateway.questions import Asked, Questions
from spolia_bench.gateway.steady import steadily
from spolia_bench.gateway.timing import RoundTime, StreamTime
from spolia_bench.gateway.ways import Way, engine_alone, over_grpc, over_http
from spolia_bench.shared.pairs import difference
from spolia_decode.config import DecodeConfig
from spolia_engine.engine import Engine

_median = statistics.median
ALONE, GRPC, HTTP = "engine", "grpc", "http"
STEADY = "_steady"
"""Ends the names of that section's figures; those of the burst have no ending."""
Times = dict[str, list[RoundTime]]
Section = Callable[[Way, list[Asked]], Awaitable[list[StreamTime]]]
"""Has one way answer a round's questions."""


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
        for (num_streams, ending), times in asyncio.run(_all(cluster, engine, config, model, options)).items():
            _tell(report, num_streams, ending, times)


async def _all(
    cluster: LocalCluster, engine: Engine, config: DecodeConfig, model: Path, options: Options
) -> dict[tuple[int, str], Times]:
    """By the number of streams and the ending of the section's names."""
    questions = Questions(model, options.tokens, options.seed)
    async with AsyncExitStack() as stack:
        ways = {
            ALONE: await stack.enter_async_context(engine_alone(engine, config)),
            GRPC: await stack.enter_async_context(over_grpc(cluster.address)),
            HTTP: await stack.enter_async_context(over_http(cluster.http_address)),
        }
        found: dict[tuple[int, str], Times] = {}
        for num_streams in options.streams:
            burst = await _rounds(ways, _at_once, partial(questions.several, num_streams), options.rounds)
            found[num_streams, ""] = burst
            progress(f"{num_streams} streams at once: {options.rounds} rounds")
            if num_streams > 1 and options.answers:  # one alone does the same in both
                spread_s = _median([t.answer_ms(options.tokens) for t in burst[ALONE]]) / 1e3
                ask = partial(_steadily, num_streams=num_streams, spread_s=spread_s)
                draw = partial(questions.several, num_streams * options.answers)
                found[num_streams, STEADY] = await _rounds(ways, ask, draw, options.rounds)
                progress(f"{num_streams} streams steadily: {options.rounds} rounds")
        return found


async def _rounds(ways: Mapping[str, Way], ask: Section, draw: Callable[[], list[Asked]], num_rounds: int) -> Times:
    """Each round begins with another way; the first round does not count."""
    names = list(ways)
    times: Times = {name: [] for name in names}
    for number in range(num_rounds + 1):
        at = number % len(names)
        asked = draw()
        for name in names[at:] + names[:at]:
            took = await ask(ways[name], asked)
            if number:
                times[name].append(RoundTime.of(took))
    return times


async def _at_once(way: Way, asked: list[Asked]) -> list[StreamTime]:
    streams = await asyncio.gather(*(way(one) for one in asked))
    for stream, one in zip(streams, asked, strict=True):
        stream.check(one.num_tokens)
    return streams


async def _steadily(way: Way, asked: list[Asked], *, num_streams: int, spread_s: float) -> list[StreamTime]:
    return await steadily(way, asked, num_streams, spread_s)


def _tell(report: Report, num_streams: int, ending: str, times: Times) -> None:
    """HTTP's figures bear the plain names: it is the longer way. `overhead` is over the engine alone in the same round,
    `added` over what the decode node says of the same requests, which leaves out what all of it slows the engine by.
    """
    which = f"{num_streams}{ending}"
    for way in times:
        found, alone = times[way], times[ALONE]
        ttft, token = _median([t.ttft_ms for t in found]), _median([t.token_ms for t in found])
        report.figures[f"{way}_ttft_ms_{which}"] = round(ttft, 3)
        report.figures[f"{way}_token_ms_{which}"] = round(token, 3)
        if ending:
            report.figures[f"{way}_answers_{which}"] = sum(t.num_answers for t in found)
        row = [which.replace("_", " "), way, f"{ttft:.1f}", f"{token:.2f}"]
        if way != ALONE:
            over = {
                "ttft_overhead": difference([t.ttft_ms for t in found], [t.ttft_ms for t in alone]),
                "token_overhead": difference([t.token_ms for t in found], [t.token_ms for t in alone]),
                "ttft_added": difference([t.added_ttft_ms for t in found], [0.0] * len(found)),
                "token_added": difference([t.added_token_ms for t in found], [0.0] * len(found)),
            }
            for name, more in over.items():
                figure = f"{'' if way == HTTP else 'grpc_'}{name}_ms_{which}"
                report.figures[figure] = round(more.median, 3)
                report.figures[f"{figure}_interval"] = [round(more.low, 3), round(more.high, 3)]
            row += [str(more) for more in over.values()]
        report.rows.append(row + [""] * (len(report.header) - len(row)))
