"""A step's attention on a CPU by our own machine code: what a batch decides is laid down once, a layer is two calls."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from spolia_kernels.attend.native_cpu import way_of
from spolia_kernels.native.kernels import Kernels, kernels, step_kernels
from spolia_kernels.native.tasks import COMMON, MERGE, SLOT, STEP, block_room, few_room
from spolia_kernels.span_step.items import StepItems
from spolia_kernels.span_step.spans import SlotRows, SpanRange


def span_kernels(slots: Sequence[SlotRows], ranges: Sequence[SpanRange]) -> Kernels | None:
    """The kernels, where `SpanStep` may be had for these; None elsewhere."""
    memory = [x for each in slots for x in (each.key, each.value)]
    memory += [x for each in ranges for x in (each.key, each.value)]
    if not all(x.device.type == "cpu" and x.dtype == torch.float32 and x.stride(-1) == 1 for x in memory):
        return None
    if not all(x.stride(3) == x.shape[4] for each in slots for x in (each.key, each.value)):
        return None
    found = kernels()
    if not isinstance(found, Kernels):
        return None
    head_dim, v_dim = (x.shape[-1] for x in memory[:2])
    lanes = found.lanes_for(head_dim, v_dim)
    if lanes is None or not found.has(*step_kernels(head_dim, v_dim, found.lanes), lanes=lanes):
        return None
    return found


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
        num_kv_heads, head_dim, v_dim = key.shape[2], key.shape[4], value.shape[4]
        num_rows, group_size = sum(each.num_rows for each in slots), num_q_heads // num_kv_heads
        lanes = here.lanes_for(head_dim, v_dim)
        assert lanes is not None, "span_kernels says where there is none"
        most = max([group_size * len(each.rows) for each in ranges if each.together], default=0)
        block = way_of(here, max(most, here.lanes // 2 + 1, 8), head_dim, v_dim)
        items = StepItems(slots, ranges, num_kv_heads, group_size, block.block_rows, torch.get_num_threads())
        self._kept = (*slots, *ranges)
        self._tables = items.tables()
        self._lens = self._tables.slots[:, SLOT.index("num_keys")]
        self._sizes = (num_rows, num_q_heads, v_dim)
        self._here, self._threads = here, torch.get_num_threads()
        narrow, wide, merge = step_kernels(head_dim, v_dim, here.lanes)
        self._kernels = ((wide if block.kernel == "attend_wide" else narrow, lanes), (merge, lanes))
        floats = max(
            block_room(items.most_rows, block.block_rows, head_dim, v_dim),
            few_room(items.most_rows, lanes, head_dim, v_dim),
        )
        self._room = torch.empty(self._threads * floats)
        self._parts = torch.empty(num_kv_heads, items.num_parts, v_dim)
        self._lse = torch.empty(num_kv_heads, items.num_parts)
        self._step = _told(
            STEP,
            num_items=len(items.items),
            room=self._room.data_ptr(),
            room_floats=floats,
            room_rows=items.most_rows,
            group_size=group_size,
            num_rows=num_rows,
            items=self._tables.items.data_ptr(),
            ranges=self._tables.ranges.data_ptr(),
            slots=self._tables.slots.data_ptr(),
            num_parts=items.num_parts,
            parts=self._parts.data_ptr(),
            lse=self._lse.data_ptr(),
        )
        self._merge = _told(
            MERGE,
            num_items=num_rows * num_kv_heads,
            room=self._room.data_ptr(),
            group_size=group_size,
            num_rows=num_rows,
            num_parts=items.num_parts,
            parts=self._parts.data_ptr(),
            lse=self._lse.data_ptr(),
            starts=self._tables.starts.data_ptr(),
            entries=self._tables.entries.data_ptr(),
            out_row=num_q_heads * v_dim,
        )

    def begin(self, lens: Sequence[int]) -> None:
        """Keys of each row's slot, the one that is written now included."""
        self._lens.copy_(torch.tensor(lens, dtype=torch.int64))

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Tensor:
        """Writes the rows' keys and values and attends: query [num_q_heads, num_rows, head_dim], key [num_kv_heads,
        num_rows, head_dim] and value [num_kv_heads, num_rows, v_dim], dense in the last dimension. Returns
        [num_q_heads, num_rows, v_dim], whose rows are dense over all heads.
        """
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        step, merge, numbers = self._step, self._merge, self._here.numbers(sm_scale)
        step[_LAYER] = layer
        for first, x in ((_QUERY, query), (_KEY, key), (_VALUE, value)):
            step[first : first + 3] = [x.data_ptr(), x.stride(0), x.stride(1)]
        num_rows, num_q_heads, v_dim = self._sizes
        out = query.new_empty(num_rows, num_q_heads, v_dim)
        merge[_OUT] = out.data_ptr()
        for told, (kernel, lanes) in zip((step, merge), self._kernels, strict=True):
            told[0] = told[1] = 0
            told[_NUMBERS] = numbers
            self._here.call(kernel, lanes, told, self._threads)
        return out.transpose(0, 1)


_LAYER, _QUERY, _KEY, _VALUE = (STEP.index(name) for name in ("layer", "query", "key", "value"))
_OUT, _NUMBERS = MERGE.index("out"), COMMON.index("numbers")


def _told(names: Sequence[str], **values: int) -> ctypes.Array[ctypes.c_int64]:
    assert values.keys() <= set(names), values.keys() - set(names)
    return (ctypes.c_int64 * len(names))(*(values.get(name, 0) for name in names))
