"""One sequence's rows through the model: in slices, each behind those before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from spolia_engine.adapter import ModelAdapter
from spolia_engine.attention import ContextAttention, VisibleRange, visible_ranges
from spolia_engine.extent import Extent
from spolia_engine.pool import Pool
from spolia_engine.run import Run, SlotRange, Span
from spolia_engine.steps import Pause, Slice, Steps

OnLayer = Callable[[Run, int], None]
"""Called in the engine's thread when a layer of a slice has run: the slice's own run, the layer just finished."""


@dataclass(frozen=True, slots=True)
class PassOptions:
    """How a pass runs.

    `slice_tokens`: rows of one prefill slice; between two slices others may use the engine. None: all rows at once.
    `ready`: whether the KV that the pass reads has arrived as far as a layer; None: it is all here.
    `joins`: each slice is handed to whoever owns the engine, to be run with other passes' (`joint_pass.py`). A pass
    that waits for its KV keeps its slices to itself: nobody else shall wait for that.
    """

    slice_tokens: int | None = None
    on_layer: OnLayer | None = None
    ready: Callable[[int], bool] | None = None
    joins: bool = False


AT_ONCE = PassOptions()


@dataclass(frozen=True, slots=True, eq=False)
class RanRows:
    """KV of the rows, and the last row's hidden state [hidden], a copy: a view would keep a whole prompt's."""

    run: Run
    last_hidden: Tensor


def run_rows(
    adapter: ModelAdapter,
    pool: Pool,
    token_ids: Sequence[int],
    positions: Sequence[int],
    visible: Sequence[tuple[Span, int]],
    options: PassOptions = AT_ONCE,
    *,
    num_dropped: int = 0,
) -> Steps[RanRows]:
    """Runs rows standing at `positions` (ascending); row r sees each (span, first row) of `visible` with first row ≤ r,
    and the rows at or before it.

    The run holds no KV of the first `num_dropped` rows; its rope_base is the first position kept. Where positions have
    gaps, `LinkPlan.pieces` says which slots stand where. Raises `Busy` when the pool has no room. Source: Sarathi-Serve
    (2403.02310) §4.2 for slices.
    """
    num_rows = len(token_ids)
    size = min(options.slice_tokens or num_rows, num_rows)
    # Later slices see the dropped rows too, so these keep their slots until the run as a whole goes.
    unkept = num_dropped if size == num_rows else 0
    extent = pool.allocate(num_rows - unkept)
    try:
        for start in range(0, num_rows, size):
            end = min(start + size, num_rows)
            attention = ContextAttention(
                extent,
                start,
                end - start,
                _seen_by_slice(visible, extent, start, end),
                adapter.rotary,
                num_dropped=unkept,
            )
            on_layer = _of_slice(options.on_layer, Run(extent, start, end - start - unkept, positions[start + unkept]))
            rows = Slice(token_ids[start:end], positions[start:end], attention, on_layer)
            if options.joins and options.ready is None:
                ran = yield Pause(slice=rows)
                assert ran is not None, "whoever takes a slice sends what came of it"
                hidden = ran.hidden
            else:
                hidden = yield from adapter.forward_steps(
                    rows.token_ids, rows.positions, rows.attention, rows.on_layer, options.ready
                )
            if end < num_rows:
                yield Pause(end - start)
    except BaseException:
        pool.release(extent)
        raise
    first = num_dropped - unkept
    return RanRows(Run(extent, first, num_rows - num_dropped, positions[num_dropped]), hidden[-1].clone())


def _seen_by_slice(visible: Sequence[tuple[Span, int]], extent: Extent, start: int, end: int) -> Sequence[VisibleRange]:
    """What rows `start` … `end` see besides each other, first rows counted in the slice."""
    ranges = visible_ranges((span, max(0, first_row - start)) for span, first_row in visible if first_row < end)
    if start:
        ranges.append(VisibleRange(SlotRange(extent, 0, start, 0), 0))
    return ranges


def _of_slice(on_layer: OnLayer | None, run: Run) -> Callable[[int], None] | None:
    return None if on_layer is None else lambda layer: on_layer(run, layer)
