"""Batches of decode rows over slots and ranges, and one step of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kernel_worlds import poisoned

from spolia_kernels import Kernels, RotaryTable, Rotation, SlotRows, SpanRange, SpanStep, span_kernels
from spolia_kernels.span_step import span_step_ref

LAYERS, CAPACITY, SCALE = 2, 48, 0.2


@dataclass
class Step:
    """A batch and a step of it."""

    slots: list[SlotRows]
    ranges: list[SpanRange]
    lens: list[int]
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def native(self, here: Kernels | None = None) -> list[torch.Tensor]:
        """Every layer's result, by the machine code."""
        found = here or span_kernels(self.slots, self.ranges)
        assert found is not None
        step = SpanStep(found, self.slots, self.ranges, self.query.shape[0])
        step.begin(self.lens)
        return [step(layer, self.query, self.key, self.value, SCALE) for layer in range(LAYERS)]

    def reference(self) -> list[torch.Tensor]:
        parts = (self.slots, self.ranges, self.lens)
        return [span_step_ref(*parts, layer, self.query, self.key, self.value, SCALE) for layer in range(LAYERS)]

    def copy(self) -> Step:
        return Step([SlotRows(s.key.clone(), s.value.clone()) for s in self.slots], *list(vars(self).values())[1:])


def step_of(
    rows: int,
    readers: list[tuple[int, tuple[int, ...], bool, bool]],
    *,
    ratio: int = 1,
    heads: int = 2,
    head_dim: int = 32,
    v_dim: int | None = None,
    rotary_dim: int | None = None,
    seed: int = 0,
    stretches: int = 1,
) -> Step:
    """`readers`: for each range its keys, the rows that read it, whether it stands elsewhere, whether together."""
    torch.manual_seed(seed)
    v_dim = v_dim or head_dim
    table = RotaryTable(torch.rand((rotary_dim or head_dim) // 2), head_dim=head_dim, max_position=64)
    lens = [int(n) for n in torch.randint(1, CAPACITY + 1, (rows,))]
    sizes = [rows // stretches + (n < rows % stretches) for n in range(stretches)]
    slots = [SlotRows(*(torch.randn(LAYERS, n, heads, CAPACITY, d) for d in (head_dim, v_dim))) for n in sizes if n]
    ranges = []
    for num_keys, who, elsewhere, together in readers:
        memory = [poisoned(torch.randn(LAYERS, heads, num_keys, d)) for d in (head_dim, v_dim)]
        turn = Rotation.to(-torch.randint(1, 60, (len(who),)), table) if elsewhere else None
        ranges.append(SpanRange(*memory, who, turn, together))
    # As a projection gives them: heads of a row side by side.
    query, key, value = (
        torch.randn(rows, n, d).transpose(0, 1)
        for n, d in ((heads * ratio, head_dim), (heads, head_dim), (heads, v_dim))
    )
    return Step(slots, ranges, lens, query, key, value)


ALL = tuple(range(9))
SOME = [(70, ALL, True, True), (129, (1, 3, 8), True, True), (64, ALL, False, False), (1, (4,), False, True)]
