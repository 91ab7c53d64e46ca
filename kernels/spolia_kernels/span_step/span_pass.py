"""A pass's attention on a CPU by our own machine code: many rows over the ranges they see and over themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spolia_kernels.native.kernels import Kernels
from spolia_kernels.native.tasks import RANGE
from spolia_kernels.partial import Partial
from spolia_kernels.span_step.items import StepItems
from spolia_kernels.span_step.launch import Launch, block_way, kernels_of
from spolia_kernels.span_step.spans import Heads, SpanRange

_TRIANGLE_ROWS = 32
"""Rows that see each other in the triangle they are; what is before it they see in one product."""
_MAX_PARTS = 1 << 24
"""Floats that parts of all rows may take: 64 MiB."""


def pass_kernels(query: Tensor, heads: Heads, ranges: Sequence[SpanRange]) -> Kernels | None:
    """The kernels, where `SpanPass` may be had for rows like those of query [num_q_heads, num_rows, head_dim]; None
    elsewhere.
    """
    memory = [x for each in ranges for x in (each.key, each.value)]
    if not all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (query, *memory)):
        return None
    if query.numel() == 0 or not all(x.stride(-1) == 1 and x.numel() for x in memory):
        return None
    seen = 2 * query.shape[1] + sum(len(each.rows) for each in ranges)
    if seen * heads.num_q_heads * heads.v_dim > _MAX_PARTS:
        return None
    return kernels_of(heads.head_dim, heads.v_dim)


class SpanPass:
    """Rows of a pass, a layer in two calls. Not thread-safe.

        out[row] = merge( what it sees of the rows, every range it sees, each with the query turned by its rotation )

    Source: Hydragen (arXiv 2402.05099) §3.1 and EPIC (arXiv 2410.15332) §4, with queries rotated instead of keys.
    """

    def __init__(
        self, here: Kernels, heads: Heads, ranges: Sequence[SpanRange], num_rows: int, *, sees_itself: bool
    ) -> None:
        """`sees_itself`: rows follow each other and each sees those at or before it (`attend`); else what they see of
        each other is brought along (`beside`). The ranges' memory must stay where it is.
        """
        own = _before_triangles(heads, num_rows) if sees_itself else []
        every = [*ranges, *own]
        block = block_way(here, heads, every)
        items = StepItems(
            num_rows,
            every,
            heads.num_kv_heads,
            heads.group_size,
            block.block_rows,
            torch.get_num_threads(),
            triangle_rows=_TRIANGLE_ROWS if sees_itself else 0,
        )
        self._kept = tuple(every)
        self._launch = Launch(here, heads, block, items)
        self._own_ranges = self._launch.tables.ranges[len(ranges) :, : RANGE.index("num_keys")]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Tensor:
        """Of query [num_q_heads, num_rows, head_dim], key [num_kv_heads, num_rows, head_dim] and value [num_kv_heads,
        num_rows, v_dim]: [num_q_heads, num_rows, v_dim], whose rows are dense over all heads.
        """
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        place = [field for x in (key, value) for field in (x.data_ptr(), 0, x.stride(0), x.stride(1))]
        self._own_ranges.copy_(torch.tensor(place, dtype=torch.int64))
        return self._launch(layer, query, (key, value), sm_scale)

    def beside(self, own: Partial, layer: int, query: Tensor, sm_scale: float) -> Tensor:
        """`own` of the rows, none being empty, with the ranges: [num_q_heads, num_rows, v_dim], rows dense."""
        launch = self._launch
        launch.own_out.copy_(own.out.unflatten(0, launch.own_out.shape[:2]))
        launch.own_lse.copy_(own.lse.unflatten(0, launch.own_lse.shape[:2]))
        return launch(layer, query if query.stride(-1) == 1 else query.contiguous(), None, sm_scale)


def _before_triangles(heads: Heads, num_rows: int) -> list[SpanRange]:
    """For the rows of each triangle what is before it. Where keys and values lie is said in every layer."""
    nothing = torch.empty(1, 1, 1, 1)
    found = []
    for first in range(_TRIANGLE_ROWS, num_rows, _TRIANGLE_ROWS):
        rows = tuple(range(first, min(first + _TRIANGLE_ROWS, num_rows)))
        key, value = (nothing.expand(1, heads.num_kv_heads, first, width) for width in (heads.head_dim, heads.v_dim))
        found.append(SpanRange(key, value, rows, None, True))
    return found


assert RANGE[: RANGE.index("num_keys")] == tuple(
    f"{name}{step}" for name in ("key", "value") for step in ("", "_layer", "_head", "_token")
), "as `attend` tells them"
