"""FlexAttention at the same points: all rows as one sequence over what is shared and every row's own, under a mask.

Queries count as rotated and the rows' own keys as written: less than what ours does. Blocks that no row of a block of
queries sees are skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spolia_bench.gpu.batches import DEVICE, Heads, Point
from spolia_bench.gpu.timing import figures, timed

PATIENCE_S = 4.0
"""For a point, on average, compiling included; once it is spent, points that are left are left out."""
MASK_ROWS = 128
"""Rows of a block of the mask. FlexAttention's kernel for fewer rows takes GQA heads side by side in one tile, of at
most so many; where it chooses a tile itself it may choose one too high, and then has no kernel at all."""


class OutOfTime(RuntimeError):
    """Compiling took what there was for it."""


class Patience:
    """Seconds that all points together may spend: every shape is compiled anew."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    @contextmanager
    def spent(self) -> Iterator[None]:
        """Counts what is done inside. Raises `OutOfTime` where nothing is left."""
        if self._left <= 0:
            raise OutOfTime("no time left to compile it")
        began = time.monotonic()
        try:
            yield
        finally:
            self._left -= time.monotonic() - began


def compare(at: Sequence[tuple[str, Heads, Point]]) -> Iterator[dict[str, Any]]:
    """FlexAttention's column, a row per point and head shape: last, for compiling it takes as long as it takes."""
    patience = Patience(PATIENCE_S * len(at))
    for name, heads, point in at:
        row: dict[str, Any] = {"heads": name, "point": str(point)}
        try:
            with patience.spent():
                row |= figures("flex", timed(flex(point, heads, compiled()), repeats=10, inner=5))
        except Exception as error:  # a compiler may fail in many ways: its column says so
            row["flex_error"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        torch.cuda.empty_cache()
        yield row


def flex(point: Point, heads: Heads, attention: Callable[..., Any]) -> Callable[[], Tensor]:
    """One layer's attention, [1, num_q_heads, rows, head_dim], by `attention`: FlexAttention, compiled or not."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, shared, own = point.rows, point.shared, point.suffix + 1
    total = shared + rows * own

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key < shared) | ((key - shared) // own == row)

    mask = create_block_mask(sees, None, None, rows, total, device=DEVICE, BLOCK_SIZE=MASK_ROWS)
    query, key, value = (
        torch.empty(1, count, length, heads.head_dim, dtype=torch.bfloat16, device=DEVICE).normal_()
        for count, length in ((heads.num_q_heads, rows), (heads.num_kv_heads, total), (heads.num_kv_heads, total))
    )
    is_cut = rows < MASK_ROWS < rows * heads.group
    options = {"BLOCK_M": MASK_ROWS} if is_cut else None
    return lambda: attention(query, key, value, block_mask=mask, enable_gqa=heads.group > 1, kernel_options=options)


def compiled(backend: str | Callable[..., Any] = "inductor") -> Callable[..., Any]:
    """FlexAttention for one shape. What was compiled for others is forgotten: after eight of them torch would go on
    without compiling, and say so in a warning only.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=backend)
