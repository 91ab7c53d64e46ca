"""The kernels on the device against references on the CPU, in float64 or, for whole layers, float32."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import random
from concurrent.futures import ProcessPoolExecutor

import torch

from spolia_kernels import Partial, RotaryTable, attend, merge, rotate
from spolia_kernels.paged import (
    Angles,
    PagedKv,
    Rows,
    SlotSpan,
    Tails,
    WorkShape,
    attend_spans,
    attend_tails,
    plan_work,
)

LIMITS = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
Found = tuple[str, float, float]
"""What was compared, the largest error, the largest that is right."""


def errors() -> list[Found]:
    """Everything that is checked before anything is timed; kernels compile in as many processes as there are cores."""
    checks = [(dtype, 0, 0, 0, 0) for dtype in LIMITS]
    checks += list(itertools.product(LIMITS, (64, 128, 256), (2,), (1, 8), (16, 32, 64)))
    with ProcessPoolExecutor(min(14, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_check, checks))


def _check(check: tuple[torch.dtype, int, int, int, int]) -> Found:
    torch.set_num_threads(1)  # as many processes as cores
    dtype, head_dim, num_kv_heads, group, tile = check
    name = str(dtype).removeprefix("torch.")
    if not head_dim:
        return f"attend, rotate, merge {name}", _attend_error(dtype), LIMITS[dtype]
    what = f"paged {name} head_dim {head_dim} heads {num_kv_heads} x {group} tile {tile}"
    try:
        error = _paged_error(dtype, head_dim, num_kv_heads, group, tile)
    except Exception as failure:  # a kernel that does not compile or fit is off, too
        what, error = f"{what}: {str(failure).splitlines()[0][:80]}", math.inf
    return what, error, LIMITS[dtype]


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
    """Spans and tails of a small batch, answers against float32 from the same 16-bit numbers."""
    rng = random.Random(head_dim + group)
    generator = torch.Generator().manual_seed(0)
    num_rows, num_pages, page = 21, 96, 64
    num_q_heads, sm_scale = num_kv_heads * group, head_dim**-0.5
    memory = [torch.randn(num_kv_heads, num_pages * page, head_dim, generator=generator).to(dtype) for _ in range(2)]
    joined = torch.randn(num_rows, num_kv_heads * (group + 2), head_dim, generator=generator).to(dtype)
    spans = []
    for start, length in ((5, 100), (200, 700), (1000, 333)):
        rows = tuple(rng.sample(range(num_rows), 17))
        spans.append(SlotSpan(start, start + length, rows, tuple(rng.randint(0, 900) for _ in rows)))
    free = rng.sample(range(30, num_pages), 2 * num_rows)
    pages = torch.tensor(free, dtype=torch.int32).reshape(num_rows, 2)
    starts = torch.tensor([rng.randint(900, 1500) for _ in range(num_rows)], dtype=torch.int32)
    lengths = torch.tensor([rng.randint(0, 127) for _ in range(num_rows)], dtype=torch.int32)
    shape = WorkShape(num_kv_heads, group, tile, 256)
    inv_freq = 10000.0 ** -(torch.arange(head_dim // 2).double() / head_dim * 2)
    turned = torch.outer(torch.arange(2048).double(), inv_freq)

    def answer(device: str, dtype: torch.dtype) -> torch.Tensor:
        key, value = (m.to(device, dtype, copy=True) for m in memory)
        kv = PagedKv(key, value, page)
        rows = Rows.of(joined.to(device, dtype), num_q_heads)
        tails = Tails(pages.to(device), starts.to(device), (starts + lengths).to(device))
        angles = Angles(turned.cos().float().to(device), turned.sin().float().to(device))
        work = plan_work(spans, num_rows, shape, device)
        partials = attend_spans(rows.query, kv, work, tails.positions, angles, sm_scale=sm_scale)
        return attend_tails(rows, kv, tails, partials, work, angles, sm_scale=sm_scale).float().cpu()

    return float((answer("cuda", dtype) - answer("cpu", torch.float32)).abs().max())
