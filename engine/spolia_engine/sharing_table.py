"""The switch between shared and private treatment, measured on this device for this model's heads.

Whether one product for all rows beats each row reading for itself depends on how a device reads, multiplies and
schedules, and models of that are wrong. So both are timed, by turns, over rows × shared tokens, and what was measured
decides. What is timed is what steps run: the kernels over extents, or those over a device's slots. The table is kept on
disk, by device and shape.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from spolia_engine.device_work import WorkCutter
from spolia_engine.paged_ways import PagedWays
from spolia_kernels import (
    Kernels,
    Partial,
    SlotRows,
    SpanRange,
    SpanStep,
    WhyNot,
    attend,
    attend_private,
    kernels,
    span_kernels,
)

ROWS = (2, 4, 8, 16, 32, 64)
TOKENS = (16, 32, 64, 128, 256, 512, 1024)
NUM_PAIRS = 5
MIN_STRETCH_S = 0.0005
"""Of one timing: a call takes 20 us and more."""
NUM_COPIES = 4
"""Sets of keys and values read by turns, as layers are: none is in the nearest cache when its turn comes. The second
cache of a GPU holds them all, which favours private reading: a table is wrong towards that, if at all."""
FORMAT = 2


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What decides the crossing on one device."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    page_size: int | None = None
    """Slots of a page, where KV lies in the memory of a device and its kernels attend; None: in extents."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Microseconds of one attention over a range, both ways, the medians of pairs measured by turns."""

    shared_us: float
    private_us: float

    @property
    def shared_pays(self) -> bool:
        """Whether the rows attend together."""
        return self.shared_us <= self.private_us


class SharingTable:
    """Answers for any number of rows and tokens by the measured cell below it, or the first one."""

    def __init__(self, cells: Mapping[tuple[int, int], Cell]) -> None:
        """`cells` by (rows, tokens): every number of rows with every number of tokens. Raises ValueError for none."""
        if not cells:
            raise ValueError("a table of no cells")
        self.cells = dict(cells)
        self._rows = sorted({rows for rows, _ in cells})
        self._tokens = sorted({tokens for _, tokens in cells})

    def __call__(self, num_rows: int, num_tokens: int) -> bool:
        """See `Sharing`."""
        rows = self._rows[max(0, bisect_right(self._rows, num_rows) - 1)]
        tokens = self._tokens[max(0, bisect_right(self._tokens, num_tokens) - 1)]
        return self.cells[rows, tokens].shared_pays


@torch.inference_mode()
def measure_sharing(shape: AttentionShape, device: torch.device | str = "cpu") -> SharingTable:
    """Times every cell now, with torch's present number of threads: a second on two cores."""
    prepare = _over_extents(shape, device) if shape.page_size is None else _over_slots(shape, torch.device(device))
    cells: dict[tuple[int, int], Cell] = {}
    for tokens in TOKENS:
        for rows in ROWS:
            ways = [prepare(rows, tokens, shared) for shared in (True, False)]
            times = _by_turns(*ways, is_cuda=torch.device(device).type == "cuda")
            cells[rows, tokens] = Cell(*(1e6 * statistics.median(each) / NUM_COPIES for each in times))
    return SharingTable(cells)


Prepare = Callable[[int, int, bool], Callable[[], object]]
"""Attention of so many rows over so many tokens of all copies, shared or not."""


def _over_extents(shape: AttentionShape, device: torch.device | str) -> Prepare:
    dtype: torch.dtype = getattr(torch, shape.dtype)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, shape.head_dim, device=device).to(dtype)

    keys, values = (drawn(NUM_COPIES, shape.num_kv_heads, max(TOKENS)) for _ in range(2))
    queries = drawn(shape.num_q_heads, max(ROWS))
    slots = SlotRows(*(drawn(NUM_COPIES, max(ROWS), shape.num_kv_heads, 1) for _ in range(2)))
    here = span_kernels([slots], [])
    if here is not None:
        own = drawn(shape.num_kv_heads, max(ROWS))
        return partial(_prepared_span, here, slots, keys, values, queries, own)

    def prepare(rows: int, tokens: int, shared: bool) -> Callable[[], object]:
        memory = [(key[:, :tokens], value[:, :tokens]) for key, value in zip(keys, values, strict=True)]
        return partial(_attend_all, attend if shared else attend_private, queries[:, :rows], memory)

    return prepare


def _prepared_span(
    here: Kernels,
    slots: SlotRows,
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    own: Tensor,
    rows: int,
    tokens: int,
    shared: bool,
) -> Callable[[], object]:
    """Steps of rows that have a token of their own each, as decode steps run them."""
    read = SpanRange(keys[:, :, :tokens], values[:, :, :tokens], tuple(range(rows)), None, shared)
    step = SpanStep(here, [SlotRows(slots.key[:, :rows], slots.value[:, :rows])], [read], queries.shape[0])
    step.begin([1] * rows)
    query, key, scale = queries[:, :rows], own[:, :rows], queries.shape[2] ** -0.5

    def run() -> None:
        for layer in range(NUM_COPIES):
            step(layer, query, key, key, scale)

    return run


def _over_slots(shape: AttentionShape, device: torch.device) -> Prepare:
    assert shape.page_size is not None
    ways = PagedWays(
        WorkCutter(shape.num_kv_heads, shape.num_q_heads // shape.num_kv_heads, device),
        head_dim=shape.head_dim,
        page_size=shape.page_size,
        dtype=getattr(torch, shape.dtype),
        num_layers=NUM_COPIES,
        max_rows=max(ROWS),
        max_tokens=max(TOKENS),
    )
    return lambda rows, tokens, shared: ways.attention(rows, tokens, shared=shared)


def _attend_all(way: Callable[..., Partial], query: Tensor, memory: Sequence[tuple[Tensor, Tensor]]) -> None:
    for key, value in memory:
        way(query, key, value, sm_scale=query.shape[2] ** -0.5)


def _by_turns(
    first: Callable[[], object], second: Callable[[], object], *, is_cuda: bool
) -> tuple[list[float], list[float]]:
    """Seconds of one call of each, in `NUM_PAIRS` stretches by turns."""

    def stretch(work: Callable[[], object], count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            work()
        if is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    counts = []
    for work in (first, second):
        count = 1
        stretch(work, 1)  # warms up
        while stretch(work, count) < MIN_STRETCH_S:
            count *= 2
        counts.append(count)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(NUM_PAIRS):
        for work, count, found in zip((first, second), counts, times, strict=True):
            found.append(stretch(work, count) / count)
    return times


def load_sharing(shape: AttentionShape, folder: Path, device: torch.device | str = "cpu") -> SharingTable:
    """The table kept in `folder` for this device and shape, else one measured now and kept there.

    A folder that cannot be written costs a measurement at each start, nothing else; a file that cannot be read is
    written anew.
    """
    file = folder / f"{_key(shape, device)}.json"
    try:
        record = json.loads(file.read_text())
        return SharingTable({(rows, tokens): Cell(*times) for rows, tokens, *times in record["cells"]})
    except (OSError, ValueError, KeyError, TypeError):
        pass
    table = measure_sharing(shape, device)
    cells = [[rows, tokens, cell.shared_us, cell.private_us] for (rows, tokens), cell in table.cells.items()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        building = file.with_suffix(f".{os.getpid()}")
        building.write_text(json.dumps({"shape": asdict(shape), "device": _device_name(device), "cells": cells}))
        building.replace(file)
    except OSError:
        pass
    return table


def _key(shape: AttentionShape, device: torch.device | str) -> str:
    words = [f"v{FORMAT}", _device_name(device), torch.__version__, f"t{torch.get_num_threads()}"]
    words += [f"{shape.num_q_heads}x{shape.num_kv_heads}x{shape.head_dim}", shape.dtype]
    words += [_attended_by()] if shape.page_size is None else [f"p{shape.page_size}"]
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in "-".join(words))


def _attended_by() -> str:
    found = kernels()
    return "torch" if isinstance(found, WhyNot) else f"l{found.lanes}"


def _device_name(device: torch.device | str) -> str:
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name()


def _cpu_name() -> str:
    """As the kernel calls it, where it says."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
