"""Attention of decode rows over KV in slots: spans that many rows read, then every row's own tail.

    attend_spans   each row's partial over each span it reads, at the row's own offset
    attend_tails   the rows' new KV into their tails, and each row over its own, merged with its partials
    append_paged   new KV into slots, for rows that nobody attends in the same launch

A prompt's pass needs its keys rotated anyway, for its rows attend each other: it rotates them once and copies them to
where they stay. `append_paged` would rotate them once more, and save nothing but that the copy reads what is rotated.

CUDA: Triton kernels, fit for CUDA graphs: what changes from step to step is read on the device. Elsewhere, and for
heads of other sizes than 64, 128 and 256: `reference.py`. Queries and keys come unrotated; kernels rotate them on the
way, once, by the distance that counts. Source: Hydragen (2402.05099) §3, EPIC (2410.15332) §4, the running softmax of
FlashAttention (2205.14135) §3.1; persistent programs over a work list as in Stream-K (2301.03598).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spolia_kernels.paged.memory import PagedKv
from spolia_kernels.paged.reference import Angles, Rows, Tails, append_paged_ref, attend_spans_ref, attend_tails_ref
from spolia_kernels.paged.tuning import Tuning, piece_keys, span_tuning, tail_tuning
from spolia_kernels.paged.work import PagedWork, SlotSpan, WorkShape, plan_work
from spolia_kernels.partial import Partial

__all__ = [
    "Angles",
    "PagedKv",
    "PagedWork",
    "Rows",
    "SlotSpan",
    "Tails",
    "Tuning",
    "WorkShape",
    "append_paged",
    "attend_spans",
    "attend_tails",
    "piece_keys",
    "plan_work",
]


def attend_spans(
    query: Tensor,
    kv: PagedKv,
    work: PagedWork,
    positions: Tensor,
    angles: Angles,
    *,
    sm_scale: float,
    into: Partial | None = None,
    tuned: Tuning | None = None,
) -> Partial:
    """Partials of every part of `work`, float32: `out` [num_parts, num_q_heads, head_dim], `lse` without the last.

    `query` [num_rows, num_q_heads, head_dim], unrotated, rows at any stride; `positions` int32 [num_rows]. Reading i
    of row r sees its keys as a query at position positions[r] - offsets[i] would, which must not be negative. `into`
    has room for at least num_parts and is written and returned; without it memory is taken.
    """
    if into is None:
        shape = (max(1, work.num_parts), query.shape[1])
        into = Partial(
            torch.zeros(*shape, kv.head_dim, dtype=torch.float32, device=query.device),
            torch.full(shape, float("-inf"), dtype=torch.float32, device=query.device),
        )
    if not uses_triton(query):
        found = attend_spans_ref(query, kv, work, positions, angles, sm_scale=sm_scale)
        into.out[: work.num_parts], into.lse[: work.num_parts] = found.out, found.lse
        return into
    from spolia_kernels.paged import launch  # Triton is there where a CUDA device is

    launch.attend_spans(query, kv, work, positions, angles, sm_scale, into, tuned or span_tuning(query, work.tile))
    return into


def attend_tails(
    rows: Rows,
    kv: PagedKv,
    tails: Tails,
    partials: Partial,
    work: PagedWork,
    angles: Angles,
    *,
    sm_scale: float,
    into: Tensor | None = None,
    num_rows: Tensor | None = None,
    tuned: Tuning | None = None,
) -> Tensor:
    """Writes every row's KV behind its tail and returns its attention over the tail and, by their partials, its spans.

    [num_rows, num_q_heads, head_dim] in the query's dtype; `into` is written and returned. `num_rows` int32 [1]: only
    so many rows are there, which is read on the device; all of them where it is None.
    """
    query = rows.query
    if into is None:
        into = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not uses_triton(query):
        there = query.shape[0] if num_rows is None else int(num_rows)
        into[:there] = attend_tails_ref(rows.first(there), kv, tails, partials, work, angles, sm_scale=sm_scale)
        return into
    from spolia_kernels.paged import launch

    launch.attend_tails(rows, kv, tails, partials, work, angles, sm_scale, into, num_rows, tuned or tail_tuning(query))
    return into


def append_paged(key: Tensor, value: Tensor, kv: PagedKv, slots: Tensor, positions: Tensor, angles: Angles) -> None:
    """Writes KV of rows into `slots`, the keys turned to `positions` (int32 [num_rows] both; slots are distinct).

    `key`, unrotated, and `value` [num_rows, num_kv_heads, head_dim], rows of both at one stride.
    """
    if not uses_triton(key):
        append_paged_ref(key, value, kv, slots, positions, angles)
        return
    from spolia_kernels.paged import launch

    launch.append_paged(key, value, kv, slots, positions, angles)


def uses_triton(tensor: Tensor) -> bool:
    """Whether the kernels run for this tensor: on CUDA, with a head size that Triton's tiles have."""
    return tensor.device.type == "cuda" and tensor.shape[-1] in (64, 128, 256)
