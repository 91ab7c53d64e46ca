"""Paged attention by its definition: gather, rotate, attend, merge. For tests, and where nothing else runs."""

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
class Rows:
    """A layer's queries and new KV, unrotated, [num_rows, heads, head_dim]; rows of all three at one stride."""

    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def of(cls, joined: Tensor, num_q_heads: int) -> Rows:
        """Views of [num_rows, num_q_heads + 2 · num_kv_heads, head_dim]: queries, keys, values side by side."""
        key, value = joined[:, num_q_heads:].chunk(2, 1)
        return cls(joined[:, :num_q_heads], key, value)

    def first(self, num_rows: int) -> Rows:
        """The first rows."""
        return Rows(self.query[:num_rows], self.key[:num_rows], self.value[:num_rows])


@dataclass(frozen=True, slots=True, eq=False)
class Tails:
    """What each row alone reads: its own pages, behind which it writes a key and value in this step."""

    pages: Tensor
    """int32 [num_rows, max_pages]."""
    starts: Tensor
    """int32 [num_rows]: position of the first page's first token."""
    positions: Tensor
    """int32 [num_rows]: of the row; its pages hold the keys of starts … positions - 1, and then its own."""


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
    for head, first, count, start, end, part, *_ in work.items[: int(work.num_items)].tolist():
        readings = slice(first, first + count)
        rows = work.rows[readings].long()
        heads = slice(head * group, head * group + group)
        turned = rotated(query[rows][:, heads].transpose(0, 1), positions[rows] - work.offsets[readings], angles)
        key, value = (memory[head, None, start:end] for memory in (kv.key, kv.value))
        found = attend_ref(turned, key, value, sm_scale=sm_scale)
        out[part : part + count, heads] = found.out.transpose(0, 1)
        lse[part : part + count, heads] = found.lse.t()
    return Partial(out, lse)


def attend_tails_ref(
    rows: Rows, kv: PagedKv, tails: Tails, partials: Partial, work: PagedWork, angles: Angles, *, sm_scale: float
) -> Tensor:
    """Computes `attend_tails`; see there."""
    num_rows = rows.query.shape[0]
    positions = tails.positions[:num_rows]
    new_slots = [int(kv.slots_of(tails.pages[row])[positions[row] - tails.starts[row]]) for row in range(num_rows)]
    append_paged_ref(rows.key, rows.value, kv, torch.tensor(new_slots, device=positions.device), positions, angles)
    answers: list[Tensor] = []
    for row in range(num_rows):
        turned = rotated(rows.query[row, :, None], positions[row, None], angles)
        held = kv.slots_of(tails.pages[row])[: positions[row] - tails.starts[row] + 1]
        parts = work.parts[int(work.part_starts[row]) : int(work.part_starts[row + 1])].tolist()
        found = [attend_ref(turned, kv.key[:, held], kv.value[:, held], sm_scale=sm_scale)]
        found += [Partial(partials.out[part, :, None], partials.lse[part, :, None]) for part in parts]
        answers.append(merge_ref(found).out[:, 0])
    return torch.stack(answers).to(rows.query.dtype)


def append_paged_ref(key: Tensor, value: Tensor, kv: PagedKv, slots: Tensor, positions: Tensor, angles: Angles) -> None:
    """Computes `append_paged`; see there."""
    kv.key[:, slots.long()] = rotated(key.transpose(0, 1), positions, angles).to(kv.key.dtype)
    kv.value[:, slots.long()] = value.transpose(0, 1).to(kv.value.dtype)
