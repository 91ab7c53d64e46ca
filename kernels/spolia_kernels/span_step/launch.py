"""A layer's items and merge handed to the kernels: what stays from layer to layer is laid down once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from spolia_kernels.attend.native_cpu import Way, way_of
from spolia_kernels.native.kernels import Kernels, kernels, step_kernels
from spolia_kernels.native.tasks import COMMON, MERGE, STEP, block_room, few_room
from spolia_kernels.span_step.items import StepItems
from spolia_kernels.span_step.spans import Heads, SpanRange


def kernels_of(head_dim: int, v_dim: int) -> Kernels | None:
    """The kernels, all that heads of these widths need being there; None where they are not to be had."""
    found = kernels()
    if not isinstance(found, Kernels):
        return None
    lanes = found.lanes_for(head_dim, v_dim)
    if lanes is None or not found.has(*step_kernels(head_dim, v_dim, found.lanes), lanes=lanes):
        return None
    return found


def block_way(here: Kernels, heads: Heads, ranges: Sequence[SpanRange]) -> Way:
    """The kernel that computes many rows together, as suits the range that most rows attend."""
    most = max([heads.group_size * len(each.rows) for each in ranges if each.together], default=0)
    return way_of(here, max(most, here.lanes // 2 + 1, 8), heads.head_dim, heads.v_dim)


class Launch:
    """Runs items, and then the merge of what they left. Not thread-safe."""

    def __init__(self, here: Kernels, heads: Heads, block: Way, items: StepItems) -> None:
        """`block` is that of the items. What they read must stay where it is."""
        lanes = here.lanes_for(heads.head_dim, heads.v_dim)
        assert lanes is not None, "whoever asks whether there are kernels is told that there are none"
        self.tables = items.tables()
        self._here, self._heads, self._num_rows = here, heads, items.num_rows
        self._threads = torch.get_num_threads()
        narrow, wide, merge = step_kernels(heads.head_dim, heads.v_dim, here.lanes)
        self._kernels = ((wide if block.kernel == "attend_wide" else narrow, lanes), (merge, lanes))
        floats = max(
            block_room(items.most_rows, block.block_rows, heads.head_dim, heads.v_dim),
            few_room(items.most_rows, lanes, heads.head_dim, heads.v_dim),
        )
        self._room = torch.empty(self._threads * floats)
        self._parts = torch.empty(heads.num_kv_heads, items.num_parts, heads.v_dim)
        self._lse = torch.empty(heads.num_kv_heads, items.num_parts)
        own = slice(heads.group_size * items.num_rows)
        self.own_out = self._parts[:, own].unflatten(1, (heads.group_size, items.num_rows))
        """Where rows' own parts go, [num_kv_heads, group_size, num_rows, v_dim]; `own_lse` without the last."""
        self.own_lse = self._lse[:, own].unflatten(1, (heads.group_size, items.num_rows))
        self._step = _told(
            STEP,
            num_items=len(items.items),
            room=self._room.data_ptr(),
            room_floats=floats,
            room_rows=items.most_rows,
            group_size=heads.group_size,
            num_rows=items.num_rows,
            items=self.tables.items.data_ptr(),
            ranges=self.tables.ranges.data_ptr(),
            slots=self.tables.slots.data_ptr(),
            num_parts=items.num_parts,
            parts=self._parts.data_ptr(),
            lse=self._lse.data_ptr(),
        )
        self._merge = _told(
            MERGE,
            num_items=items.num_rows * heads.num_kv_heads,
            room=self._room.data_ptr(),
            group_size=heads.group_size,
            num_rows=items.num_rows,
            num_parts=items.num_parts,
            parts=self._parts.data_ptr(),
            lse=self._lse.data_ptr(),
            starts=self.tables.starts.data_ptr(),
            entries=self.tables.entries.data_ptr(),
            out_row=heads.num_q_heads * heads.v_dim,
        )

    def __call__(self, layer: int, query: Tensor, own: tuple[Tensor, Tensor] | None, sm_scale: float) -> Tensor:
        """Of query [num_q_heads, num_rows, head_dim], and the rows' own keys and values [num_kv_heads, num_rows, …] if
        items want them, all dense in the last dimension: [num_q_heads, num_rows, v_dim], whose rows are dense.
        """
        step, merge, numbers = self._step, self._merge, self._here.numbers(sm_scale)
        step[_LAYER] = layer
        for first, x in zip((_QUERY, _KEY, _VALUE), (query, *(own or ())), strict=False):
            step[first : first + 3] = [x.data_ptr(), x.stride(0), x.stride(1)]
        out = query.new_empty(self._num_rows, self._heads.num_q_heads, self._heads.v_dim)
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
