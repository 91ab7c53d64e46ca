"""The kernels on the device against references on the CPU, in float64 or, for whole layers, float32."""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from spolia_bench.gpu.batches import DEVICE
from spolia_bench.gpu.crew import NoAnswer, answers
from spolia_bench.gpu.sampling import SPREADS, spread_logits
from spolia_kernels import Partial, RotaryTable, attend, merge, rotate
from spolia_kernels.paged import (
    Angles,
    PagedKv,
    PagedWork,
    Rows,
    SlotSpan,
    Tails,
    WorkShape,
    append_paged,
    attend_spans,
    attend_tails,
    plan_work,
)
from spolia_kernels.paged.reference import append_paged_ref, attend_spans_ref, attend_tails_ref
from spolia_kernels.sample import Draws, sample_ref, sample_rows

LIMITS = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
GRID_S = 180.0
"""For all checks, compiling included. One that has not ended by then is off."""
MAX_PROCESSES = 14
Found = tuple[str, float, float]
"""What was compared, the largest error, the largest that is right."""


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison. `kind`: a function of `KINDS`; what it has no use for is 0."""

    kind: str
    dtype: torch.dtype
    head_dim: int = 0
    group: int = 0
    tile: int = 0

    def __str__(self) -> str:
        sizes = f" head_dim {self.head_dim} group {self.group} tile {self.tile}" if self.head_dim else ""
        return f"{self.kind} {str(self.dtype).removeprefix('torch.')}{sizes}"


CHECKS = (
    *(Check("attend", dtype) for dtype in LIMITS),
    *(Check("sample", dtype) for dtype in LIMITS),
    *(Check("append", dtype, head_dim) for dtype, head_dim in itertools.product(LIMITS, (64, 128, 256))),
    *(Check("paged", *each) for each in itertools.product(LIMITS, (64, 128, 256), (1, 8), (16, 32, 64))),
    *(Check("paged", torch.bfloat16, 128, group, 64) for group in (2, 4, 7)),
)


def errors() -> list[Found]:
    """Everything that is checked before anything is timed; kernels compile in as many processes as there are cores.

    What takes the compiler longest comes first: float32 in wide tiles, which it spills, a minute each.
    """
    longest_first = sorted(CHECKS, key=lambda c: c.dtype.itemsize * c.head_dim * c.tile, reverse=True)
    return errors_of(longest_first, GRID_S)


def errors_of(checks: Sequence[Check], seconds: float) -> list[Found]:
    """What each check found. One whose process died, or that has not ended by then, is off, and nobody waits for it."""
    num_processes = min(MAX_PROCESSES, os.cpu_count() or 1)
    return [
        (f"{check}: {found.why}", math.inf, LIMITS[check.dtype]) if isinstance(found, NoAnswer) else found
        for check, found in zip(checks, answers(check_one, checks, num_processes, seconds), strict=True)
    ]


def check_one(check: Check) -> Found:
    """Runs a check, in a process of its own but for tests."""
    torch.set_num_threads(1)  # as many processes as cores
    limit = 0.0 if check.kind == "sample" else LIMITS[check.dtype]
    try:
        return str(check), KINDS[check.kind](check), limit
    except Exception as failure:  # a kernel that does not compile or fit is off, too
        return f"{check}: {str(failure).splitlines()[0][:80]}", math.inf, limit


def attend_error(check: Check) -> float:
    """Two merged, rotated partials against one attend."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(8, 7, 64, generator=generator)
    key, value = (torch.randn(2, 1000, 64, generator=generator) for _ in range(2))
    exact = attend(query.double(), key.double(), value.double(), sm_scale=0.125).out
    on_device = [t.to(DEVICE, check.dtype) for t in (query, key, value)]
    table = RotaryTable(torch.ones(32) * 0.1, head_dim=64, max_position=4096, device=DEVICE)
    shift = torch.full((7,), 1000, device=DEVICE)
    turned = rotate(rotate(on_device[0], shift, table), -shift, table)
    parts: list[Partial] = [
        attend(turned, on_device[1][:, part], on_device[2][:, part], sm_scale=0.125)
        for part in (slice(0, 333), slice(333, None))
    ]
    return float((merge(parts).out.double().cpu() - exact).abs().max())


def sample_error(check: Check) -> float:
    """The share of rows that draw another token than the reference does from the same logits."""
    rows, vocab = 24, 32_000
    half = rows // 2
    logits = torch.cat([spread_logits(half, vocab, spread) for spread in SPREADS]).to(check.dtype)
    rng = random.Random(0)

    def held(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)

    draws = Draws(
        held([rng.choice([0.0, 0.7, 1.0, 1.5]) for _ in range(rows)], torch.float64),
        held([rng.choice([1.0, 0.9, 0.5]) for _ in range(rows)], torch.float64),
        held([rng.choice([0, 1, 40, 1000]) for _ in range(rows)], torch.int32),
        held([rng.getrandbits(63) for _ in range(rows)], torch.int64),
        held([rng.randrange(8) for _ in range(rows)], torch.int64),
        held([rng.randrange(1000) for _ in range(rows)], torch.int64),
    )
    there = Draws(*(getattr(draws, name).to(DEVICE) for name in Draws.__slots__))
    found = sample_rows(logits.to(DEVICE), there).token_ids.cpu()
    return float((found != sample_ref(logits, draws).token_ids).float().mean())


def append_error(check: Check) -> float:
    """New keys turned into their slots, and values beside them."""
    world = _World(check)
    slots = torch.randperm(world.kv(DEVICE).num_slots, generator=torch.Generator().manual_seed(1))[: world.num_rows]
    answers = []
    for device, dtype, append in ((DEVICE, check.dtype, append_paged), ("cpu", torch.float32, append_paged_ref)):
        rows, kv = world.rows(device, dtype), world.kv(device, dtype)
        at = world.tails(device).positions
        append(rows.key, rows.value, kv, slots.to(device, torch.int32), at, world.angles(device))
        answers.append(torch.stack((kv.key, kv.value)).float().cpu())
    return float((answers[0] - answers[1]).abs().max())


def paged_error(check: Check) -> float:
    """Spans and tails of a small batch, answers against float32 from the same 16-bit numbers."""
    world = _World(check)
    on_device = world.answer(DEVICE, check.dtype, attend_spans, attend_tails)
    return float((on_device - world.answer("cpu", torch.float32, attend_spans_ref, attend_tails_ref)).abs().max())


KINDS: dict[str, Callable[[Check], float]] = {
    "attend": attend_error,
    "sample": sample_error,
    "append": append_error,
    "paged": paged_error,
}


class _World:
    """A small batch: rows with tails, spans that some of them read at offsets of their own."""

    num_rows = 21
    num_pages = 96
    page = 64

    def __init__(self, check: Check) -> None:
        head_dim, group = check.head_dim, check.group or 1
        self._check = check
        num_kv_heads, num_rows = 2, self.num_rows
        self.num_q_heads = num_kv_heads * group
        rng = random.Random(head_dim + group)
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(check.dtype)

        self._memory = [normal(num_kv_heads, self.num_pages * self.page, head_dim) for _ in range(2)]
        self._joined = normal(num_rows, num_kv_heads * (group + 2), head_dim)
        self._spans = []
        for start, length in ((5, 100), (200, 700), (1000, 333)):
            rows = tuple(rng.sample(range(num_rows), 17))
            self._spans.append(SlotSpan(start, start + length, rows, tuple(rng.randint(0, 900) for _ in rows)))
        free = rng.sample(range(30, self.num_pages), 2 * num_rows)
        self._pages = torch.tensor(free, dtype=torch.int32).reshape(num_rows, 2)
        self._starts = torch.tensor([rng.randint(900, 1500) for _ in range(num_rows)], dtype=torch.int32)
        self._lengths = torch.tensor([rng.randint(0, 127) for _ in range(num_rows)], dtype=torch.int32)

    def kv(self, device: str, dtype: torch.dtype = torch.float32) -> PagedKv:
        """The same numbers in memory of its own."""
        key, value = (m.to(device, dtype, copy=True) for m in self._memory)
        return PagedKv(key, value, self.page)

    def rows(self, device: str, dtype: torch.dtype) -> Rows:
        """Queries and new KV."""
        return Rows.of(self._joined.to(device, dtype), self.num_q_heads)

    def tails(self, device: str) -> Tails:
        """Two pages a row, in any order."""
        return Tails(self._pages.to(device), self._starts.to(device), (self._starts + self._lengths).to(device))

    def angles(self, device: str) -> Angles:
        """Plain RoPE."""
        half = self._check.head_dim // 2
        turned = torch.outer(torch.arange(2048).double(), 10000.0 ** -(torch.arange(half).double() / half))
        return Angles(turned.cos().float().to(device), turned.sin().float().to(device))

    def answer(
        self,
        device: str,
        dtype: torch.dtype,
        spans: Callable[..., Partial],
        tails: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """A layer's attention, by the operations or by their references."""
        check = self._check
        shape = WorkShape(2, check.group, check.tile, 256)
        work: PagedWork = plan_work(self._spans, self.num_rows, shape, device)
        kv, rows, own, angles = (
            self.kv(device, dtype),
            self.rows(device, dtype),
            self.tails(device),
            self.angles(device),
        )
        common = {"sm_scale": check.head_dim**-0.5}
        partials = spans(rows.query, kv, work, own.positions, angles, **common)
        return tails(rows, kv, own, partials, work, angles, **common).float().cpu()
