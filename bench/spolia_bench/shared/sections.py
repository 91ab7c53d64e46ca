"""What `spolia bench shared` measures, a function per claim."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from spolia_bench.frame import Report, Table, progress
from spolia_bench.reuse.machine import Machine
from spolia_bench.reuse.operators import decode_step
from spolia_bench.reuse.rates import CAREFUL, CARELESS
from spolia_bench.shared.batches import QUESTION_TOKENS, Batch, permuted_batch, prefix_batch, random_run
from spolia_bench.shared.models import SHAPES, random_model
from spolia_bench.shared.options import Options
from spolia_bench.shared.pairs import Ratio, by_turns, ratio
from spolia_core.reuse import ChunkKind
from spolia_engine.adapter import ModelAdapter
from spolia_engine.core import EngineCore
from spolia_engine.engine import Engine
from spolia_engine.extent import BlockState
from spolia_engine.sharing import Sharing, never_shared
from spolia_engine.sharing_table import ROWS, TOKENS, SharingTable, measure_sharing
from spolia_kernels import attend, attend_private, torch_kernels_only


class World:
    """An engine, its measured switch, and where figures go."""

    def __init__(self, report: Report, options: Options, model: Any, name: str, *, takes_weights: bool = True) -> None:
        self.report = report
        self.options = options
        self.name = name
        adapter = ModelAdapter(model, takes_weights=takes_weights)
        # Answers are not read: ids become no text.
        self.core: EngineCore = Engine.of(adapter, lambda ids: "", pool_bytes=options.pool_bytes)
        self.table: SharingTable = measure_sharing(self.core.attention_shape)

    def figure(self, name: str, value: float) -> None:
        """Adds a figure of the JSON line."""
        self.report.figures[name] = round(value, 4)
        progress(f"{name} {value:.3f}")

    def ratio(self, name: str, value: Ratio) -> None:
        """Adds a ratio with its interval."""
        self.figure(name, value.median)
        self.report.figures[f"{name}_interval"] = [round(value.low, 4), round(value.high, 4)]

    @contextmanager
    def batch(self, batch: Batch) -> Iterator[Batch]:
        """A batch, given back at the end: nothing is held."""
        try:
            yield batch
        finally:
            batch.close()
            self.core.decoding.forget_plan()
            for chunk_id in self.core.resident.held(ChunkKind.LOCAL):
                self.core.resident.drop(chunk_id)
            counts = self.core.pool.counts()
            assert counts[BlockState.FREE] == self.core.pool.num_blocks, counts


def table_of(switch: SharingTable) -> Table:
    """The measured switch: microseconds shared / private, and which is used."""
    rows: list[Sequence[str]] = []
    for num_rows in ROWS:
        cells = [switch.cells[num_rows, tokens] for tokens in TOKENS]
        rows.append(
            [
                str(num_rows),
                *(f"{c.shared_us:.0f} / {c.private_us:.0f}{'' if c.shared_pays else ' private'}" for c in cells),
            ]
        )
    return Table(("rows", *(f"{tokens} tokens" for tokens in TOKENS)), rows)


def prefix(world: World, sizes: Sequence[int]) -> None:
    """Rows behind one prefix: shared against private, attention alone and whole steps, and against the floor.

    *Fused private*: private rows by torch's fused kernel instead of ours.
    """
    options = world.options
    rows: list[Sequence[str]] = []
    tag = world.options.tag_of(world.name)
    for tokens in sizes:
        label = f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)
        attention = _attention_alone(world, tokens)
        alone = ratio(attention["private"], attention["shared"])
        world.ratio(f"ratio_shared_over_private_attention{tag}_{label}", alone)
        with world.batch(prefix_batch(world.core, options.rows, tokens)) as batch:
            steps = {"shared": batch.step(world.table), "private": batch.step(never_shared)}
            with torch_kernels_only():
                steps["fused"] = _by_torch(batch.step(never_shared))
            machine = Machine(SHAPES[world.name], options.threads, CARELESS if options.quick else CAREFUL)
            times = by_turns(steps, options.rounds)
            work = decode_step(options.rows, tokens, QUESTION_TOKENS + batch.num_tail_tokens)
            machine.observe([work])
            floors = [machine.floor_now(work)]
            shared_only = by_turns({"shared": steps["shared"]}, 5)["shared"]
            machine.observe([work])
            floors.append(machine.floor_now(work))
        found = ratio(times["private"], times["shared"])
        world.ratio(f"ratio_shared_over_private{tag}_{label}", found)
        world.ratio(f"ratio_shared_over_fused_private{tag}_{label}", ratio(times["fused"], times["shared"]))
        floor_ms = statistics.fmean(floor.total_ms for floor in floors)
        over_floor = statistics.median(shared_only) / floor_ms
        # Private attention as measured, everything else at the floor: what the ratio could be on this machine.
        beside_ms = statistics.fmean(floor.total_ms - floor.attention_ms for floor in floors)
        bound = (statistics.median(attention["private"]) + beside_ms) / floor_ms
        world.figure(f"ratio_bound{tag}_{label}", bound)
        world.figure(f"step_over_floor{tag}_{label}", over_floor)
        rows.append(
            [
                world.name,
                str(tokens),
                f"{statistics.median(times['shared']):.1f}",
                f"{statistics.median(times['private']):.1f}",
                f"{statistics.median(times['fused']):.1f}",
                str(found),
                str(alone),
                f"{bound:.2f}",
                f"{floor_ms:.1f}",
                f"{over_floor:.2f}",
            ]
        )
    header = (
        "model",
        "shared tokens",
        "shared ms",
        "private ms",
        "fused private ms",
        "private ÷ shared",
        "attention alone",
        "bound",
        "floor ms",
        "÷ floor",
    )
    world.report.tables.append(Table(header, rows))


def _by_torch(step: Callable[[], object]) -> Callable[[], object]:
    def by_torch() -> None:
        with torch_kernels_only():
            step()

    return by_torch


def _attention_alone(world: World, tokens: int) -> dict[str, list[float]]:
    """Milliseconds of all layers' attention over the shared range, both ways, round by round.

    Layer after layer, so that none stays in a cache.
    """
    shape, core = world.core.attention_shape, world.core
    run = random_run(core, tokens)
    query = torch.randn(shape.num_q_heads, world.options.rows, shape.head_dim)
    layers = list(zip(run.extent.key, run.extent.value, strict=True))

    @torch.inference_mode()
    def all_layers(kernel: Any) -> None:
        for key, value in layers:
            kernel(query, key, value, sm_scale=shape.head_dim**-0.5)

    times = by_turns(
        {"shared": partial(all_layers, attend), "private": partial(all_layers, attend_private)}, world.options.rounds
    )
    core.pool.release(run.extent)
    return times


def permuted(world: World) -> None:
    """The same documents, each row in an order of its own, against one common prefix of as many tokens."""
    options = world.options
    documents, length = options.documents, options.document_tokens
    rows: list[Sequence[str]] = []
    for k in (0, 16):
        batches = [
            prefix_batch(world.core, options.rows, documents * length),
            permuted_batch(world.core, options.rows, documents, length, k),
        ]
        steps = {"prefix": batches[0].step(world.table), "permuted": batches[1].step(world.table)}
        times = by_turns(steps, options.rounds)
        held = _held_over_distinct(world.core, batches[1], documents, length, k)
        for batch in batches[1:]:
            batch.close()
        with world.batch(batches[0]):
            pass
        world.figure(f"kv_bytes_over_distinct_tokens_k{k}", held)
        found = ratio(times["permuted"], times["prefix"])
        world.ratio(f"ratio_permuted_over_prefix_k{k}", found)
        rows.append([str(k), *(f"{statistics.median(times[n]):.1f}" for n in ("prefix", "permuted")), str(found)])
    world.report.tables.append(Table(("link tokens", "common prefix ms", "permuted ms", "permuted ÷ prefix"), rows))


def _held_over_distinct(core: EngineCore, batch: Batch, documents: int, length: int, k: int) -> float:
    """Bytes that the rows hold over those of the distinct tokens they read: the documents once, and each row's own."""
    extents = {span.run.extent for sequence in batch.sequences for span in sequence.context.spans}
    extents |= {sequence.tail.extent for sequence in batch.sequences}
    own = sum(1 + documents * k + QUESTION_TOKENS + sequence.tail.length for sequence in batch.sequences)
    return sum(extent.num_blocks for extent in extents) * core.pool.block_size / (documents * length + own)


def grid(world: World) -> None:
    """Never slower than not sharing: the switch's plan against the private plan, everywhere."""
    worst = Ratio(0.0, 0.0, 0.0)
    rows: list[Sequence[str]] = []
    for num_rows in world.options.grid_rows:
        cells = []
        for tokens in world.options.grid_tokens:
            with world.batch(prefix_batch(world.core, num_rows, tokens)) as batch:
                switches: dict[str, Sharing] = {"switched": world.table, "private": never_shared}
                steps = {name: batch.step(sharing) for name, sharing in switches.items()}
                times = by_turns(steps, world.options.grid_rounds)
            found = ratio(times["switched"], times["private"])
            cells.append(f"{found.median:.2f} ({found.low:.2f} …)")
            worst = max(worst, found, key=lambda r: r.low)
        rows.append([str(num_rows), *cells])
        progress(f"grid of {num_rows} rows: {cells}")
    world.figure("grid_worst_slowdown_low", worst.low - 1)
    world.report.tables.append(Table(("rows", *(f"{t} tokens" for t in world.options.grid_tokens)), rows))


def deterministic(world: World) -> None:
    """What it costs that every sequence takes its steps alone."""
    tokens = world.options.grid_tokens[-1]
    rows: list[Sequence[str]] = []
    for num_rows in world.options.grid_rows:
        with world.batch(prefix_batch(world.core, num_rows, tokens)) as batch:
            times = by_turns({"together": batch.step(world.table), "alone": batch.step_alone()}, world.options.rounds)
        found = ratio(times["alone"], times["together"])
        world.ratio(f"ratio_deterministic_{num_rows}", found)
        rows.append([str(num_rows), *(f"{statistics.median(times[n]):.1f}" for n in ("together", "alone")), str(found)])
    header = (f"rows behind {tokens} tokens", "together ms", "alone ms", "alone ÷ together")
    world.report.tables.append(Table(header, rows))


def world_of(report: Report, options: Options, name: str) -> World:
    """A world of a shape whose weights nobody else needs."""
    return World(report, options, random_model(name, options.seed), name)
