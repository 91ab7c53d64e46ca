"""One layer's attention at named points: shared by our kernels, private by the same, and what else there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from spolia_bench.gpu.batches import (
    Heads,
    Point,
    angles,
    num_pages,
    planned,
    private_spans,
    random_kv,
    random_rows,
    shared_spans,
    tails_of,
    tile_for,
)
from spolia_bench.gpu.flashinfer_cascade import cascade
from spolia_bench.gpu.flex import Patience, flex
from spolia_bench.gpu.rates import Rates
from spolia_bench.gpu.timing import graphed, timed
from spolia_kernels import Partial
from spolia_kernels.paged import PagedWork, attend_spans, attend_tails

MHA, GQA = Heads(32, 32), Heads(32, 4)
HEADS = (("mha", MHA), ("gqa8", GQA))
NAMED = [
    Point(32, 1024, 0),
    Point(32, 4096, 128),
    Point(32, 16384, 0),
    Point(256, 1024, 128),
    Point(256, 4096, 0),
    Point(256, 16384, 128),
    Point(1024, 1024, 0),
    Point(1024, 16384, 128),
]
GRID = [
    Point(rows, shared, suffix) for rows in (32, 256, 1024) for shared in (1024, 4096, 16384) for suffix in (0, 128)
]
FLEX_S = 90.0
"""For FlexAttention at all points, compiling included; points that come later are left out."""
PRIVATE_BYTES = 400e9
"""Private readings beyond this are not timed: they take a tenth of a second and say nothing new."""


class Layer:
    """One layer's KV and one batch's queries at a point."""

    def __init__(self, point: Point, heads: Heads) -> None:
        self.point, self.heads = point, heads
        self.kv = random_kv(num_pages(point, 0), heads)
        self.rows = random_rows(point.rows, heads)
        self.tails = tails_of(point, -(-point.shared // self.kv.page_size), 0)
        self.angles = angles(heads.head_dim, point.shared + point.suffix + 2)
        self.sm_scale = heads.head_dim**-0.5

    def work(self, *, shared: bool) -> PagedWork:
        """Items for one treatment."""
        tile = tile_for(self.point.rows if shared else 1, self.heads.group)
        spans = shared_spans(self.point) if shared else private_spans(self.point)
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        return planned(spans, self.point.rows, self.heads, tile, processors)

    def step(self, work: PagedWork) -> Callable[[], torch.Tensor]:
        """Spans, then tails: what a decode step runs in a layer."""
        shape = (max(1, work.num_parts), self.heads.num_q_heads)
        into = Partial(torch.zeros(*shape, self.heads.head_dim, device="cuda"), torch.zeros(*shape, device="cuda"))
        result = torch.empty(self.rows.query.shape, dtype=self.rows.query.dtype, device="cuda")

        def run() -> torch.Tensor:
            part = attend_spans(
                self.rows.query, self.kv, work, self.tails.positions, self.angles, sm_scale=self.sm_scale, into=into
            )
            return attend_tails(
                self.rows, self.kv, self.tails, part, work, self.angles, sm_scale=self.sm_scale, into=result
            )

        return run


def compare(rates: Rates, points: list[Point]) -> Iterator[dict[str, Any]]:
    """One row of figures per point and head shape."""
    for name, heads in HEADS:
        for point in points:
            layer = Layer(point, heads)
            floor = sum(rates.floor_ms(*each) for each in point.floors(heads))
            row: dict[str, Any] = {"heads": name, "point": str(point), "floor_ms": floor}
            shared = layer.step(layer.work(shared=True))
            answer = shared()
            row["shared_ms"] = timed(graphed(shared)).median_ms
            if point.rows * point.shared * heads.key_bytes <= PRIVATE_BYTES:
                private = layer.step(layer.work(shared=False))
                row["max_difference"] = float((answer.float() - private().float()).abs().max())
                row["private_ms"] = timed(graphed(private), repeats=5).median_ms
            for other, run in _others(layer):
                try:
                    row[f"{other}_ms"] = timed(graphed(run), repeats=10).median_ms
                except RuntimeError as error:  # a backend that does not take this shape
                    row[f"{other}_error"] = str(error).splitlines()[0][:120]
            try:
                row["flashinfer_ms"] = timed(cascade(point, heads), repeats=10, inner=5).median_ms
            except (ImportError, RuntimeError) as error:
                row["flashinfer_error"] = str(error).splitlines()[0][:120]
            row["roofline"] = floor / row["shared_ms"]
            del layer
            torch.cuda.empty_cache()
            yield row


def compare_flex(points: list[Point]) -> Iterator[dict[str, Any]]:
    """FlexAttention's column, a row per point and head shape: last, for compiling it takes as long as it takes."""
    patience = Patience(FLEX_S)
    for name, heads in HEADS:
        for point in points:
            row: dict[str, Any] = {"heads": name, "point": str(point)}
            try:
                with patience.spent():
                    row["flex_ms"] = timed(flex(point, heads), repeats=10, inner=5).median_ms
            except Exception as error:  # a compiler may fail in many ways: its column says so
                row["flex_error"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            torch.cuda.empty_cache()
            yield row


def _others(layer: Layer) -> Iterator[tuple[str, Callable[[], object]]]:
    """Hydragen's decomposition out of PyTorch's own attention kernels; rows are the query length of one sequence.

    Only what is shared is asked of them, with no rotation, no tail and no merge: less than what ours does.
    """
    heads, point = layer.heads, layer.point
    query = layer.rows.query.transpose(0, 1).contiguous()[None]
    memory = (held[:, : point.shared] for held in (layer.kv.key, layer.kv.value))
    key, value = (m.repeat_interleave(heads.group, 0)[None].contiguous() for m in memory)
    aten = torch.ops.aten
    yield "flash2_span_only", lambda: aten._scaled_dot_product_flash_attention(query, key, value)
    yield (
        "cudnn_span_only",
        lambda: aten._scaled_dot_product_cudnn_attention(query, key, value, None, True),
    )
