"""What Triton compiles for Hopper of the kernels over tails gives the references' answers, by a machine for PTX.

The interpreter runs the source: it knows no layouts, no copies on their way, and cannot multiply bfloat16.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from compiled_worlds import Asked, Compiled, compiled
from ptx_memory_worlds import DeviceMemory

from spolia_kernels.paged import Angles, PagedKv, PagedWork, Rows, SlotSpan, Tails, WorkShape, plan_work
from spolia_kernels.paged.reference import attend_spans_ref, attend_tails_ref

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

NUM_ROWS, NUM_KV_HEADS, NUM_PAGES = 3, 2, 24
SM_SCALE = 0.2
LIMITS = {torch.bfloat16: 2e-2, torch.float32: 2e-5}


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel as it is launched."""

    group: int
    head_dim: int = 128
    page: int = 16
    dtype: torch.dtype = torch.bfloat16


CASES = [Case(1), Case(2, head_dim=64), Case(4), Case(8, page=64), Case(7, head_dim=64, dtype=torch.float32)]


@cache
def _compiled() -> dict[Case, Compiled]:
    return dict(zip(CASES, compiled([_asked(case) for case in CASES]), strict=True))


def _asked(case: Case) -> Asked:
    tensors = "*fp32" if case.dtype == torch.float32 else "*bf16"
    sizes: dict[str, Any] = {"HALF": case.head_dim // 2, "PAGE": case.page, "KEYS": 16}
    options = {"num_warps": 1, "num_stages": 2}
    if case.group == 1:
        sizes |= {"NUM_HEADS": NUM_KV_HEADS}
        return Asked("spolia_kernels.paged.attend_own_triton:attend_own_kernel", tensors, sizes, options)
    sizes |= {"NUM_KV_HEADS": NUM_KV_HEADS, "GROUP": case.group, "TILE": 1 << (case.group - 1).bit_length()}
    sizes |= {"PRECISION": "ieee" if case.dtype == torch.float32 else "tf32"}
    return Asked("spolia_kernels.paged.attend_tails_triton:attend_tails_kernel", tensors, sizes, options)


class World:
    """Rows with tails of some lengths, one of them given, and partials of spans; NaN where nobody may read."""

    def __init__(self, case: Case, first_length: int) -> None:
        rng, generator = random.Random(first_length), torch.Generator().manual_seed(first_length)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(case.dtype)

        def ints(values: Any) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32)

        slots = (NUM_KV_HEADS, NUM_PAGES * case.page, case.head_dim)
        self.kv = PagedKv(normal(*slots), normal(*slots), case.page)
        num_heads = NUM_KV_HEADS * case.group
        self.joined = normal(NUM_ROWS, num_heads + 2 * NUM_KV_HEADS, case.head_dim)
        self.rows = Rows.of(self.joined, num_heads)
        half = case.head_dim // 2
        inv_freq = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
        turned = torch.outer(torch.arange(512, dtype=torch.float64), inv_freq)
        self.angles = Angles(turned.cos().float(), turned.sin().float())
        pages = rng.sample(range(NUM_PAGES // 2, NUM_PAGES), 3 * NUM_ROWS)
        lengths = [first_length, *(rng.randrange(3 * case.page) for _ in range(NUM_ROWS - 1))]
        starts = [rng.randint(100, 200) for _ in range(NUM_ROWS)]
        positions = ints([start + length for start, length in zip(starts, lengths, strict=True)])
        self.tails = Tails(ints(pages).reshape(NUM_ROWS, 3), ints(starts), positions)
        spans = [SlotSpan(3, 90, (1, 2), (5, 60)), SlotSpan(20, 60, (1,), (30,))]  # row 0 has none
        self.work: PagedWork = plan_work(spans, NUM_ROWS, WorkShape(NUM_KV_HEADS, case.group, 16, 50))
        common = {"sm_scale": SM_SCALE}
        query = self.rows.query
        self.partials = attend_spans_ref(query, self.kv, self.work, positions, self.angles, **common)
        read = torch.zeros(slots[1], dtype=torch.bool)
        for of_row, length in zip(self.tails.pages, lengths, strict=True):
            read[self.kv.slots_of(of_row)[:length]] = True
        for memory in (self.kv.key, self.kv.value):
            memory[:, ~read] = torch.nan

    def by_the_compiled(self, kernel: Compiled) -> tuple[torch.Tensor, PagedKv]:
        """The answer, 7 where nothing was written, and KV as it is then."""
        memory = DeviceMemory(8 << 20)
        query, tails, work = self.rows.query, self.tails, self.work
        answer = torch.full(query.shape, 7.0, dtype=query.dtype)
        at = {"query": memory.put(self.joined)}
        head_bytes = self.kv.head_dim * query.element_size()
        at["new_key"] = at["query"] + query.shape[1] * head_bytes
        at["new_value"] = at["new_key"] + NUM_KV_HEADS * head_bytes
        tensors = {"key": self.kv.key, "value": self.kv.value, "tail_pages": tails.pages, "tail_starts": tails.starts}
        tensors |= {"positions": tails.positions, "num_rows": torch.tensor([NUM_ROWS], dtype=torch.int32)}
        tensors |= {"part_starts": work.part_starts, "parts": work.parts, "part_out": self.partials.out}
        tensors |= {"part_lse": self.partials.lse, "cos": self.angles.cos, "sin": self.angles.sin, "result": answer}
        at |= {name: memory.put(tensor) for name, tensor in tensors.items()}
        numbers: dict[str, float] = {"num_slots": self.kv.num_slots, "sm_scale": SM_SCALE}
        numbers |= {"stride_row": query.stride(0), "max_pages": tails.pages.stride(0)}
        given = [*(numbers[name] if name in numbers else at[name] for name in kernel.arguments), 0, 0]
        for row in range(NUM_ROWS):
            for head in range(NUM_KV_HEADS):
                kernel.program.run(memory, given, (row, head))
        key, value = (memory.get(at[name], getattr(self.kv, name)) for name in ("key", "value"))
        return memory.get(at["result"], answer), PagedKv(key, value, self.kv.page_size)


@pytest.mark.parametrize("first_length", [0, 1, 16, 33])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_compiled_kernel_over_tails_gives_the_reference_s_answer(case: Case, first_length: int) -> None:
    world = World(case, first_length)
    found, kv = world.by_the_compiled(_compiled()[case])
    expected = attend_tails_ref(
        world.rows, world.kv, world.tails, world.partials, world.work, world.angles, sm_scale=SM_SCALE
    )
    limit = LIMITS[case.dtype]
    torch.testing.assert_close(found, expected, atol=limit, rtol=limit)
    for memory in ("key", "value"):
        torch.testing.assert_close(getattr(kv, memory), getattr(world.kv, memory), atol=1e-5, rtol=1e-2, equal_nan=True)
