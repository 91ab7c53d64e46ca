"""A step's attention on a CPU by our own machine code: what a batch decides is laid down once, a layer is two calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spolia_kernels.native.kernels import Kernels
from spolia_kernels.native.tasks import SLOT
from spolia_kernels.span_step.items import StepItems
from spolia_kernels.span_step.launch import Launch, block_way, kernels_of
from spolia_kernels.span_step.spans import Heads, SlotRows, SpanRange


def span_kernels(slots: Sequence[SlotRows], ranges: Sequence[SpanRange]) -> Kernels | None:
    """The kernels, where `SpanStep` may be had for these; None elsewhere."""
    memory = [x for each in slots for x in (each.key, each.value)]
    memory += [x for each in ranges for x in (each.key, each.value)]
    if not all(x.device.type == "cpu" and x.dtype == torch.float32 and x.stride(-1) == 1 for x in memory):
        return None
    if not all(x.stride(3) == x.shape[4] for each in slots for x in (each.key, each.value)):
        return None
    return kernels_of(*(x.shape[-1] for x in memory[:2]))


class SpanStep:
    """One row each of many sequences: `begin` each step, then call it for every layer. Not thread-safe.

        out[row] = merge( its slot, every range it reads, each with the query turned by the range's rotation )

    Row r's new key and value are written behind what its slot holds, and count. Every query head of a KV head is
    attended with it. Two rows' parts are never summed, so a row's result does not depend on the others, but for the
    kernel that their number chooses.

    Source: Hydragen (arXiv 2402.05099) §3, extended to ranges that stand at different positions for each row.
    """

    def __init__(self, here: Kernels, slots: Sequence[SlotRows], ranges: Sequence[SpanRange], num_q_heads: int) -> None:
        """`slots` are those of all rows, in their order. Their memory must stay where it is."""
        key, value = slots[0].key, slots[0].value
        heads = Heads(num_q_heads, key.shape[2], key.shape[4], value.shape[4])
        num_rows = sum(each.num_rows for each in slots)
        block = block_way(here, heads, ranges)
        items = StepItems(
            num_rows,
            ranges,
            heads.num_kv_heads,
            heads.group_size,
            block.block_rows,
            torch.get_num_threads(),
            slots=slots,
        )
        self._kept = (*slots, *ranges)
        self._launch = Launch(here, heads, block, items)
        self._lens = self._launch.tables.slots[:, SLOT.index("num_keys")]

    def begin(self, lens: Sequence[int]) -> None:
        """Keys of each row's slot, the one that is written now included."""
        self._lens.copy_(torch.tensor(lens, dtype=torch.int64))

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Tensor:
        """Writes the rows' keys and values and attends: query [num_q_heads, num_rows, head_dim], key [num_kv_heads,
        num_rows, head_dim] and value [num_kv_heads, num_rows, v_dim], dense in the last dimension. Returns
        [num_q_heads, num_rows, v_dim], whose rows are dense over all heads.
        """
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        return self._launch(layer, query, (key, value), sm_scale)
