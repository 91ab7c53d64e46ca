"""One layer's attention at named points: shared by our kernels, private by the same, and PyTorch's own kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from spolia_bench.gpu.batches import (
    DEVICE,
    Heads,
    Point,
    angles,
    num_pages,
    num_processors,
    planned,
    private_spans,
    random_kv,
    random_rows,
    shared_spans,
    tails_of,
    tile_for,
)
from spolia_bench.gpu.rates import Rates
from spolia_bench.gpu.timing import figures, graphed, timed
from spolia_kernels import Partial
from spolia_kernels.paged import PagedWork, attend_spans, attend_tails

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
_CUDNN = torch.ops.aten._scaled_dot_product_cudnn_attention.default
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
        return planned(spans, self.point.rows, self.heads, tile, num_processors())

    def step(self, work: PagedWork) -> Callable[[], torch.Tensor]:
        """Spans, then tails: what a decode step runs in a layer."""
        shape = (max(1, work.num_parts), self.heads.num_q_heads)
        into = Partial(torch.zeros(*shape, self.heads.head_dim, device=DEVICE), torch.zeros(*shape, device=DEVICE))
        result = torch.empty(self.rows.query.shape, dtype=self.rows.query.dtype, device=DEVICE)

        def run() -> torch.Tensor:
            part = attend_spans(
                self.rows.query, self.kv, work, self.tails.positions, self.angles, sm_scale=self.sm_scale, into=into
            )
            return attend_tails(
                self.rows, self.kv, self.tails, part, work, self.angles, sm_scale=self.sm_scale, into=result
            )

        return run


def points(*, grid: bool) -> list[tuple[str, Heads, Point]]:
    """What is timed, in order: every point for both shapes of heads."""
    return [(name, heads, point) for point in (GRID if grid else NAMED) for name, heads in HEADS]


def compare(rates: Rates, at: Sequence[tuple[str, Heads, Point]]) -> Iterator[dict[str, Any]]:
    """One row of figures per point and head shape."""
    for name, heads, point in at:
        layer = Layer(point, heads)
        floor = sum(rates.floor_ms(*each) for each in point.floors(heads))
        row: dict[str, Any] = {"heads": name, "point": str(point), "floor_ms": floor}
        shared = layer.step(layer.work(shared=True))
        answer = shared()
        row |= figures("shared", timed(graphed(shared)))
        if point.rows * point.shared * heads.key_bytes <= PRIVATE_BYTES:
            private = layer.step(layer.work(shared=False))
            row["max_difference"] = float((answer.float() - private().float()).abs().max())
            row |= figures("private", timed(graphed(private), repeats=5))
        for other, run in _others(layer):
            try:
                row |= figures(other, timed(graphed(run), repeats=10))
            except RuntimeError as error:  # a backend that does not take this shape
                row[f"{other}_error"] = str(error).splitlines()[0][:120]
        row["roofline"] = floor / row["shared_ms"]
        del layer
        torch.cuda.empty_cache()
        yield row


def _others(layer: Layer) -> Iterator[tuple[str, Callable[[], object]]]:
    """What PyTorch has over what is shared, with no rotation, no tail and no merge: less than what ours does.

    *Private*: FlashAttention, every row a sequence of its own that reads the shared keys for itself, GQA heads as its
    queries. *Span only*: Hydragen's decomposition, rows being the queries of one sequence.
    """
    heads, point = layer.heads, layer.point
    memory = [held[:, : point.shared] for held in (layer.kv.key, layer.kv.value)]
    if point.rows * point.shared * heads.key_bytes <= PRIVATE_BYTES:
        alone = layer.rows.query.reshape(point.rows, heads.num_kv_heads, heads.group, heads.head_dim)
        its_key, its_value = (held[None].expand(point.rows, -1, -1, -1) for held in memory)
        yield "flash2_private", lambda: _FLASH(alone, its_key, its_value)
    query = layer.rows.query.transpose(0, 1).contiguous()[None]
    key, value = (held.repeat_interleave(heads.group, 0)[None].contiguous() for held in memory)
    yield "flash2_span_only", lambda: _FLASH(query, key, value)
    yield "cudnn_span_only", lambda: _CUDNN(query, key, value, None, True)
