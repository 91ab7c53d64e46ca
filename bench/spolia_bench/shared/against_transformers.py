"""transformers' decode step of the same model, rows and tokens: in a process of its own, and in ours.

Both processes have as many threads as there are cores, so only one may compute at a time. Behind each turn the cores
are left alone until the other's OpenMP threads, which look for work for some 20 ms before they sleep, do; how much
processor time the idle process took during the other's turns is a figure. A turn is two steps, of which the second
counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from spolia_bench.frame import Table
from spolia_bench.shared.batches import QUESTION_TOKENS, prefix_batch
from spolia_bench.shared.message_pipe import Begin
from spolia_bench.shared.models import weights_digest
from spolia_bench.shared.options import Options
from spolia_bench.shared.pairs import Turn, by_turns, measured_by_turns, ratio, second_ms
from spolia_bench.shared.sections import World
from spolia_bench.shared.transformers_decode import TransformersDecode
from spolia_bench.shared.transformers_process import TransformersProcess
from spolia_core.errors import InternalError

SETTLE_S = 0.1


def against_transformers(world: World, model: Any) -> None:
    """As transformers comes, and with the huge pages that our kernels ask torch for in this process."""
    rows: list[Sequence[str]] = []
    weights = weights_digest(model)
    with TransformersProcess(_begin(world.options, 1)) as process:
        if process.weights != weights:
            raise InternalError("the two processes made different weights of one seed")
        for num_rows in (1, world.options.rows):
            own, same = _own_process(world, num_rows, process), _same_process(world, num_rows, model)
            for name, times in (("", own), ("_same_process", same)):
                found = ratio(times["transformers"], times["ours"])
                world.ratio(f"ratio_vs_transformers{name}_{num_rows}", found)
                medians = (f"{statistics.median(times[way]):.1f}" for way in ("ours", "transformers"))
                rows.append([str(num_rows), "same" if name else "own", *medians, str(found)])
    header = ("rows", "transformers' process", "ours ms", "transformers ms", "transformers ÷ ours")
    world.report.tables.append(Table(header, rows))


def _begin(options: Options, num_rows: int) -> Begin:
    # transformers' rows have a question too, of the same length, in their cache.
    cached = options.baseline_tokens + QUESTION_TOKENS
    return Begin(options.model, options.seed, num_rows, cached, options.threads)


def _own_process(world: World, num_rows: int, process: TransformersProcess) -> dict[str, list[float]]:
    options = world.options
    shares: list[float] = []
    process.begin(_begin(options, num_rows))
    with world.batch(prefix_batch(world.core, num_rows, options.baseline_tokens)) as batch:
        step = batch.step(world.table)
        turns = {
            "ours": _settled(lambda: second_ms(step), process.cpu_s, shares),
            "transformers": _settled(process.turn_ms, time.process_time, shares),
        }
        times = measured_by_turns(turns, options.rounds)
    world.figure(f"idle_process_cpu_share_{num_rows}", max(shares))
    return times


def _settled(turn: Turn, idle_cpu_s: Callable[[], float], shares: list[float]) -> Turn:
    """A turn once the other process sleeps; `shares` gets what that one took of a core meanwhile."""

    def settled() -> float:
        time.sleep(SETTLE_S)
        cpu_s, started = idle_cpu_s(), time.perf_counter()
        ms = turn()
        shares.append((idle_cpu_s() - cpu_s) / (time.perf_counter() - started))
        return ms

    return settled


def _same_process(world: World, num_rows: int, model: Any) -> dict[str, list[float]]:
    options = world.options
    with world.batch(prefix_batch(world.core, num_rows, options.baseline_tokens)) as batch:
        baseline = TransformersDecode(model, num_rows, options.baseline_tokens + QUESTION_TOKENS)
        return by_turns({"ours": batch.step(world.table), "transformers": baseline.step()}, options.rounds)
