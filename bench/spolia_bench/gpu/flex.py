"""FlexAttention at the same points: all rows as one sequence over what is shared and every row's own, under a mask.

Queries count as rotated and the rows' own keys as written: less than what ours does. Blocks that no row of a block of
queries sees are skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from spolia_bench.gpu.batches import DEVICE, Heads, Point


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


def flex(point: Point, heads: Heads, attention: Callable[..., Any] | None = None) -> Callable[[], Tensor]:
    """One layer's attention, [1, num_q_heads, rows, head_dim]. `attention`: FlexAttention compiled, where not given."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, shared, own = point.rows, point.shared, point.suffix + 1
    total = shared + rows * own

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key < shared) | ((key - shared) // own == row)

    mask = create_block_mask(sees, None, None, rows, total, device=DEVICE)
    query, key, value = (
        torch.empty(1, count, length, heads.head_dim, dtype=torch.bfloat16, device=DEVICE).normal_()
        for count, length in ((heads.num_q_heads, rows), (heads.num_kv_heads, total), (heads.num_kv_heads, total))
    )
    run = attention or _compiled()
    return lambda: run(query, key, value, block_mask=mask, enable_gqa=heads.group > 1)


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
