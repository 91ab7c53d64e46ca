"""What Triton compiles for Hopper of the kernel over spans gives the references' partials, by a machine for PTX: tensor
copies and the barriers they come by, matrix products of warps and of groups of warps, in bfloat16.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from compiled_worlds import Asked, Compiled, compiled
from ptx_memory_worlds import DeviceMemory, TensorMap

from spolia_kernels.paged import Angles, PagedKv, Rows, SlotSpan, Tuning, WorkShape, plan_work
from spolia_kernels.paged.reference import attend_spans_ref
from spolia_kernels.paged.tuning import span_tuning
from spolia_kernels.partial import Partial

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

NUM_KV_HEADS, NUM_SLOTS, HEAD_DIM = 2, 640, 128
SM_SCALE = 0.2
LIMIT = 2e-2
"""Of bfloat16: queries are rounded behind their rotation, weights before their product."""


@dataclass(frozen=True, slots=True)
class Case:
    """Rows that read a span, and how high a tile is; cut as the kernels are."""

    group: int
    tile: int
    num_rows: int

    @property
    def tuned(self) -> Tuning:
        """Its cut."""
        return span_tuning(torch.empty(1, 1, HEAD_DIM, dtype=torch.bfloat16, device="meta"), self.tile)


CASES = [Case(1, 16, 5), Case(4, 16, 6), Case(1, 64, 70), Case(8, 64, 9)]
"""Of warps' products and of groups' of warps; all with a tile that is not full."""


@cache
def _compiled() -> dict[Case, Compiled]:
    return dict(zip(CASES, compiled([_asked(case) for case in CASES]), strict=True))


def _asked(case: Case) -> Asked:
    tuned = case.tuned
    sizes = {"NUM_Q_HEADS": NUM_KV_HEADS * case.group, "GROUP": case.group, "HALF": HEAD_DIM // 2, "TILE": case.tile}
    return Asked(
        "spolia_kernels.paged.attend_spans_triton:attend_spans_kernel",
        "*bf16",
        {**sizes, "KEYS": tuned.keys, "PRECISION": "tf32"},
        {"num_warps": tuned.num_warps, "num_stages": tuned.num_stages},
        dict.fromkeys(("key", "value"), f"tensordesc<bf16[{tuned.keys}, {HEAD_DIM}]>"),
    )


class World:
    """Rows that read spans at offsets of their own; NaN where nobody may read."""

    def __init__(self, case: Case, lengths: tuple[int, int]) -> None:
        rng, generator = random.Random(case.tile), torch.Generator().manual_seed(case.group)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).bfloat16()

        def offsets(count: int) -> tuple[int, ...]:
            return tuple(rng.randint(0, 200) for _ in range(count))

        slots = (NUM_KV_HEADS, NUM_SLOTS, HEAD_DIM)
        self.kv = PagedKv(normal(*slots), normal(*slots), 16)
        num_heads = NUM_KV_HEADS * case.group
        self.joined = normal(case.num_rows, num_heads + 2 * NUM_KV_HEADS, HEAD_DIM)
        self.query = Rows.of(self.joined, num_heads).query
        self.positions = torch.tensor([rng.randint(200, 400) for _ in range(case.num_rows)], dtype=torch.int32)
        inv_freq = 10000.0 ** -(torch.arange(HEAD_DIM // 2, dtype=torch.float64) / (HEAD_DIM // 2))
        turned = torch.outer(torch.arange(512, dtype=torch.float64), inv_freq)
        self.angles = Angles(turned.cos().float(), turned.sin().float())
        of_all, of_two = lengths
        everyone = tuple(range(case.num_rows))
        spans = [
            SlotSpan(5, 5 + of_all, everyone, offsets(case.num_rows)),
            SlotSpan(NUM_SLOTS - of_two, NUM_SLOTS, (0, 2), offsets(2)),
        ]
        self.work = plan_work(spans, case.num_rows, WorkShape(NUM_KV_HEADS, case.group, case.tile, 1000))
        read = torch.zeros(NUM_SLOTS, dtype=torch.bool)
        for span in spans:
            read[span.start : span.end] = True
        for memory in (self.kv.key, self.kv.value):
            memory[:, ~read] = torch.nan

    def by_the_compiled(self, kernel: Compiled, tuned: Tuning) -> Partial:
        """What one program writes that walks all items."""
        memory, work = DeviceMemory(8 << 20), self.work
        parts = (work.num_parts, self.query.shape[1])
        out, lse = torch.full((*parts, HEAD_DIM), 7.0), torch.full(parts, 7.0)
        tensors = {"query": self.joined, "items": work.items, "num_items": work.num_items, "rows": work.rows}
        tensors |= {"offsets": work.offsets, "positions": self.positions, "cos": self.angles.cos}
        tensors |= {"sin": self.angles.sin, "part_out": out, "part_lse": lse}
        at = {name: memory.put(tensor) for name, tensor in tensors.items()}
        given: dict[str, float] = {**at, "num_slots": NUM_SLOTS, "sm_scale": SM_SCALE}
        given["stride_row"] = self.query.stride(0)
        parameters: list[float] = []
        num_rows = NUM_KV_HEADS * NUM_SLOTS
        for name in kernel.arguments:
            if name in ("key", "value"):
                held = memory.put(getattr(self.kv, name))
                handle = memory.describe(TensorMap(held, num_rows, HEAD_DIM, tuned.keys))
                parameters += [handle, num_rows, HEAD_DIM, HEAD_DIM, 1]
            else:
                parameters.append(given[name])
        kernel.program.run(memory, [*parameters, 0, 0], (0, 0), tuned.num_warps)
        return Partial(memory.get(at["part_out"], out), memory.get(at["part_lse"], lse))


@pytest.mark.parametrize("lengths", [(64, 1), (199, 64), (300, 131)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_compiled_kernel_over_spans_gives_the_reference_s_partials(case: Case, lengths: tuple[int, int]) -> None:
    world = World(case, lengths)
    found = world.by_the_compiled(_compiled()[case], case.tuned)
    expected = attend_spans_ref(world.query, world.kv, world.work, world.positions, world.angles, sm_scale=SM_SCALE)
    torch.testing.assert_close(found.lse, expected.lse, atol=LIMIT, rtol=LIMIT)
    torch.testing.assert_close(found.out, expected.out, atol=LIMIT, rtol=LIMIT)
