"""The kernels on the device against float64 on the CPU."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
from concurrent.futures import ProcessPoolExecutor

import torch

from spolia_kernels import Partial, RotaryTable, attend, merge, rotate
from spolia_kernels.paged import (
    Angles,
    PagedKv,
    PagedRange,
    Tails,
    WorkShape,
    append_paged,
    attend_spans,
    attend_tails,
    plan_work,
)
from spolia_kernels.paged.reference import append_paged_ref, attend_spans_ref, attend_tails_ref

LIMITS = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
Found = tuple[str, float, float]
"""What was compared, the largest error, the largest that is right."""


def errors() -> list[Found]:
    """Everything that is checked before anything is timed; in as many processes as there are cores, as kernels compile."""
    checks = [(dtype, 0, 0, 0, 0) for dtype in LIMITS]
    checks += list(itertools.product(LIMITS, (64, 128, 256), (2,), (1, 7, 8), (16, 128)))
    with ProcessPoolExecutor(min(14, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_check, checks))


def _check(check: tuple[torch.dtype, int, int, int, int]) -> Found:
    dtype, head_dim, num_kv_heads, group, tile = check
    name = str(dtype).removeprefix("torch.")
    if not head_dim:
        return f"attend, rotate, merge {name}", _attend_error(dtype), LIMITS[dtype]
    what = f"paged {name} head_dim {head_dim} heads {num_kv_heads} x {group} tile {tile}"
    return what, _paged_error(dtype, head_dim, num_kv_heads, group, tile), LIMITS[dtype]


def _attend_error(dtype: torch.dtype) -> float:
    """Two merged, rotated partials against one attend."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(8, 7, 64, generator=generator)
    key, value = (torch.randn(2, 1000, 64, generator=generator) for _ in range(2))
    exact = attend(query.double(), key.double(), value.double(), sm_scale=0.125).out
    on_device = [t.to("cuda", dtype) for t in (query, key, value)]
    table = RotaryTable(torch.ones(32) * 0.1, head_dim=64, max_position=4096, device="cuda")
    shift = torch.full((7,), 1000, device="cuda")
    turned = rotate(rotate(on_device[0], shift, table), -shift, table)
    parts: list[Partial] = [
        attend(turned, on_device[1][:, part], on_device[2][:, part], sm_scale=0.125)
        for part in (slice(0, 333), slice(333, None))
    ]
    return float((merge(parts).out.double().cpu() - exact).abs().max())


def _paged_error(dtype: torch.dtype, head_dim: int, num_kv_heads: int, group: int, tile: int) -> float:
    """Append, spans and tails of a small batch, answers against float64 from the same 16-bit numbers."""
    rng = random.Random(head_dim + group)
    generator = torch.Generator().manual_seed(0)
    num_rows, num_pages = 21, 96
    shape = (num_pages, num_kv_heads, 64, head_dim)
    kv = PagedKv(*(torch.randn(shape, generator=generator).to(dtype) for _ in range(2)))
    joined = torch.randn(num_rows, num_kv_heads * (group + 2), head_dim, generator=generator).to(dtype)
    free = rng.sample(range(num_pages), num_pages)
    ranges = []
    for length in (100, 700, 333):
        rows = tuple(rng.sample(range(num_rows), 17))
        pages = tuple(free.pop() for _ in range(-(-(length + 5) // 64)))
        ranges.append(PagedRange(pages, 5, 5 + length, rows, tuple(rng.randint(0, 900) for _ in rows)))
    starts = torch.tensor([rng.randint(900, 1500) for _ in range(num_rows)], dtype=torch.int32)
    lengths = torch.tensor([rng.randint(1, 128) for _ in range(num_rows)], dtype=torch.int32)
    tails = Tails(
        torch.tensor([[free.pop() for _ in range(2)] for _ in range(num_rows)], dtype=torch.int32),
        starts,
        starts + lengths - 1,
    )
    angles = torch.outer(torch.arange(2048).double(), 10000.0 ** -(torch.arange(head_dim // 2).double() / head_dim * 2))
    turn = Angles(angles.cos().float(), angles.sin().float())
    work = plan_work(ranges, num_rows, WorkShape(num_kv_heads, group, 64, tile, 256))
    sm_scale, num_q_heads = head_dim**-0.5, num_kv_heads * group

    def parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        key, value = x[:, num_q_heads:].chunk(2, 1)
        return x[:, :num_q_heads], key, value

    def moved(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [t.cuda() for t in tensors]

    kv_gpu = PagedKv(*moved(kv.key, kv.value))
    query, new_key, new_value = parts(joined.cuda())
    work_gpu = plan_work(ranges, num_rows, WorkShape(num_kv_heads, group, 64, tile, 256), "cuda")
    tails_gpu, turn_gpu = Tails(*moved(tails.pages, tails.starts, tails.positions)), Angles(*moved(turn.cos, turn.sin))
    append_paged(new_key, new_value, kv_gpu, tails_gpu, turn_gpu)
    partials = attend_spans(query, kv_gpu, work_gpu, tails_gpu.positions, turn_gpu, sm_scale=sm_scale)
    answer = attend_tails(query, kv_gpu, tails_gpu, partials, work_gpu, turn_gpu, sm_scale=sm_scale)

    query, new_key, new_value = parts(joined.float())
    wide = PagedKv(kv.key.float(), kv.value.float())
    append_paged_ref(new_key, new_value, wide, tails, turn)
    exact = attend_tails_ref(
        query,
        wide,
        tails,
        attend_spans_ref(query, wide, work, tails.positions, turn, sm_scale=sm_scale),
        work,
        turn,
        sm_scale=sm_scale,
    )
    return float((answer.float().cpu() - exact).abs().max())
