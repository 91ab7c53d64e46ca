"""Paged attention in the words of its definition: gather, rotate, attend, merge. For tests, and where nothing else runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spolia_kernels.attend.reference import attend_ref
from spolia_kernels.merge.reference import merge_ref
from spolia_kernels.paged.memory import PagedKv
from spolia_kernels.paged.work import PagedWork
from spolia_kernels.partial import Partial


@dataclass(frozen=True, slots=True, eq=False)
class Angles:
    """Cosines and sines by position, float32 [num_positions, head_dim / 2] each: all of a head rotates."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Tails:
    """What each row alone reads: its own pages, up to and with the key it writes in this step."""

    pages: Tensor
    """int32 [num_rows, max_pages]."""
    starts: Tensor
    """int32 [num_rows]: position of the first page's first token."""
    positions: Tensor
    """int32 [num_rows]: of the row; its tail holds keys starts … positions, both included."""


def rotated(x: Tensor, positions: Tensor, angles: Angles) -> Tensor:
    """x [..., num_rows, head_dim] turned to `positions` [num_rows], in x's dtype."""
    half = x.shape[-1] // 2
    cos, sin = angles.cos[positions.long()], angles.sin[positions.long()]
    first, second = x[..., :half].float(), x[..., half:].float()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def attend_spans_ref(
    query: Tensor, kv: PagedKv, work: PagedWork, positions: Tensor, angles: Angles, *, sm_scale: float
) -> Partial:
    """Computes `attend_spans`; see there."""
    num_q_heads = query.shape[1]
    group = num_q_heads // kv.num_kv_heads
    out = query.new_zeros((work.num_parts, num_q_heads, kv.head_dim), dtype=torch.float32)
    lse = query.new_full((work.num_parts, num_q_heads), float("-inf"), dtype=torch.float32)
    for head, first, count, page, start, end, part, _ in work.items[: int(work.num_items)].tolist():
        readings = slice(first, first + count)
        rows = work.rows[readings].long()
        heads = slice(head * group, head * group + group)
        turned = rotated(query[rows][:, heads].transpose(0, 1), positions[rows] - work.offsets[readings], angles)
        key, value = kv.gather(work.pages[page : page + -(-end // kv.page_size)], start, end)
        found = attend_ref(turned, key[head, None], value[head, None], sm_scale=sm_scale)
        out[part : part + count, heads] = found.out.transpose(0, 1)
        lse[part : part + count, heads] = found.lse.t()
    return Partial(out, lse)


def attend_tails_ref(
    query: Tensor,
    kv: PagedKv,
    tails: Tails,
    partials: Partial,
    work: PagedWork,
    angles: Angles,
    *,
    sm_scale: float,
) -> Tensor:
    """Computes `attend_tails`; see there."""
    rows: list[Tensor] = []
    for row in range(query.shape[0]):
        position, start = int(tails.positions[row]), int(tails.starts[row])
        turned = rotated(query[row, :, None], tails.positions[row, None], angles)
        key, value = kv.gather(tails.pages[row], 0, position - start + 1)
        parts = work.parts[int(work.part_starts[row]) : int(work.part_starts[row + 1])].tolist()
        found = [attend_ref(turned, key, value, sm_scale=sm_scale)]
        found += [Partial(partials.out[part, :, None], partials.lse[part, :, None]) for part in parts]
        rows.append(merge_ref(found).out[:, 0])
    return torch.stack(rows).to(query.dtype)


def append_paged_ref(key: Tensor, value: Tensor, kv: PagedKv, tails: Tails, angles: Angles) -> None:
    """Computes `append_paged`; see there."""
    positions = tails.positions[: key.shape[0]]
    turned = rotated(key.transpose(0, 1), positions, angles).transpose(0, 1)
    for row, (position, start) in enumerate(zip(positions.tolist(), tails.starts.tolist(), strict=False)):
        page, slot = divmod(position - start, kv.page_size)
        index = int(tails.pages[row, page])
        kv.key[index, :, slot] = turned[row].to(kv.key.dtype)
        kv.value[index, :, slot] = value[row].to(kv.value.dtype)
