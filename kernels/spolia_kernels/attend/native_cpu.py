"""Attention on a CPU by our own machine code (`spolia_kernels.native`), where it is to be had and faster."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch
from torch import Tensor

from spolia_kernels.merge import merge
from spolia_kernels.native.kernels import Kernels, few_kernel, kernels
from spolia_kernels.native.tasks import block_room, few_room
from spolia_kernels.partial import Partial

FEW_ROWS = 7
"""Up to so many, rows are attended one after the other."""
_BLOCKS = {"attend_wide": {16: 32, 8: 16, 4: 16}, "attend_narrow": {16: 16, 8: 8, 4: 8}}
"""Rows a kernel takes at a time, by lanes."""
_MAX_BLOCKS_PER_CHUNK = 4
_MIN_KEYS_PER_CUT = 512
_BUSY = 0.85
"""Share of the threads' time that a division of the work should use, if it can."""


@dataclass(frozen=True, slots=True)
class Way:
    """A kernel that attends: its name, the floats of its vectors, the rows it takes at a time."""

    kernel: str
    lanes: int
    block_rows: int

    def room_floats(self, chunk_rows: int, head_dim: int, v_dim: int) -> int:
        """Floats that a thread works in."""
        if self.block_rows == 1:
            return few_room(chunk_rows, self.lanes, head_dim, v_dim)
        return block_room(chunk_rows, self.block_rows, head_dim, v_dim)


def way_of(here: Kernels, num_rows: int, head_dim: int, v_dim: int) -> Way:
    """How so many rows over the same keys are attended fastest."""
    lanes = here.lanes_for(head_dim, v_dim) if num_rows <= FEW_ROWS else None
    if lanes is not None and here.has(few := few_kernel(head_dim, v_dim), lanes=lanes):
        return Way(few, lanes, 1)
    # The one that computes fewer rows that nobody asked for.
    sizes = {kernel: rows[here.lanes] for kernel, rows in _BLOCKS.items()}
    kernel = min(sizes, key=lambda name: -(-num_rows // sizes[name]) * sizes[name])
    return Way(kernel, here.lanes, sizes[kernel])


def native_for(query: Tensor, key: Tensor, value: Tensor) -> Kernels | None:
    """The kernels, where `attend_native` may be asked of tensors of agreeing shapes on a CPU."""
    if (
        query.device.type != "cpu"
        or query.dtype != torch.float32
        or query.numel() == 0
        or key.numel() == 0
        or value.numel() == 0
    ):
        return None
    if not query.dtype == key.dtype == value.dtype or not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
        return None
    found = kernels()
    return found if isinstance(found, Kernels) else None


def attend_native(here: Kernels, query: Tensor, key: Tensor, value: Tensor, *, sm_scale: float) -> Partial:
    """Computes `attend` of query [num_kv_heads, num_rows, head_dim], the rows of a GQA group stacked; `native_for`
    tells for which tensors.
    """
    way = way_of(here, query.shape[1], query.shape[2], value.shape[2])
    cut = Division.of(query.shape[0], query.shape[1], key.shape[1], way.block_rows, torch.get_num_threads())
    return _attend(here, way, cut, query, key, value, sm_scale)


def attend_private_native(here: Kernels, query: Tensor, key: Tensor, value: Tensor, *, sm_scale: float) -> Partial:
    """Computes `attend_private` of query [num_q_heads, num_rows, head_dim]: every row reads the keys for itself."""
    num_q_heads, num_rows, head_dim = query.shape
    num_kv_heads, num_keys, _ = key.shape
    group_size = num_q_heads // num_kv_heads
    by_row = query.unflatten(0, (num_kv_heads, group_size)).transpose(1, 2)
    stacked = by_row.reshape(num_kv_heads, num_rows * group_size, head_dim)
    way = way_of(here, group_size, head_dim, value.shape[2])
    cut = Division.by_row(num_kv_heads, num_rows, group_size, num_keys, torch.get_num_threads())
    found = _attend(here, way, cut, stacked, key, value, sm_scale)
    out = found.out.view(num_kv_heads, num_rows, group_size, -1).transpose(1, 2).reshape(num_q_heads, num_rows, -1)
    lse = found.lse.view(num_kv_heads, num_rows, group_size).transpose(1, 2).reshape(num_q_heads, num_rows)
    return Partial(out, lse)


def _attend(
    here: Kernels, way: Way, cut: Division, query: Tensor, key: Tensor, value: Tensor, sm_scale: float
) -> Partial:
    num_heads, num_rows, head_dim = query.shape
    num_keys, v_dim = key.shape[1], value.shape[2]
    out = query.new_empty(cut.num_cuts, num_heads, num_rows, v_dim)
    lse = query.new_empty(cut.num_cuts, num_heads, num_rows)
    fields = (
        num_heads,
        cut.num_chunks,
        cut.chunk_rows,
        num_rows,
        cut.cut_keys,
        num_keys,
        head_dim,
        v_dim,
        *(query.data_ptr(), query.stride(0), query.stride(1)),
        *(key.data_ptr(), key.stride(0), key.stride(1)),
        *(value.data_ptr(), value.stride(0), value.stride(1)),
        out.data_ptr(),
        lse.data_ptr(),
    )
    num_items = num_heads * cut.num_chunks * cut.num_cuts
    here.run(way.kernel, way.lanes, num_items, way.room_floats(cut.chunk_rows, head_dim, v_dim), sm_scale, fields)
    if cut.num_cuts == 1:
        return Partial(out[0], lse[0])
    return merge([Partial(out[i], lse[i]) for i in range(cut.num_cuts)])


@dataclass(frozen=True, slots=True)
class Division:
    """How the work is cut into items: rows of a head into chunks, keys into cuts."""

    num_chunks: int
    chunk_rows: int
    num_cuts: int
    cut_keys: int

    @classmethod
    @lru_cache(maxsize=1024)
    def of(cls, num_heads: int, num_rows: int, num_keys: int, block_rows: int, num_threads: int) -> Division:
        """Chunks of whole blocks, as even as they come, few rows being one; cuts only where threads would have nothing
        to do.
        """
        num_blocks = ceil(num_rows / block_rows)
        most_blocks = num_blocks if block_rows == 1 else _MAX_BLOCKS_PER_CHUNK
        chunk_blocks = ceil(num_blocks / ceil(num_blocks / most_blocks))
        num_chunks = ceil(num_blocks / chunk_blocks)
        return cls(num_chunks, chunk_blocks * block_rows, *_cuts(num_heads * num_chunks, num_keys, num_threads))

    @classmethod
    @lru_cache(maxsize=1024)
    def by_row(cls, num_heads: int, num_rows: int, group_size: int, num_keys: int, num_threads: int) -> Division:
        """A chunk for each row and its group of query heads."""
        return cls(num_rows, group_size, *_cuts(num_heads * num_rows, num_keys, num_threads))


def _cuts(items: int, num_keys: int, num_threads: int) -> tuple[int, int]:
    """Cuts of the keys and keys of a cut that keep threads busy."""
    most = max(1, min(2 * num_threads, num_keys // _MIN_KEYS_PER_CUT))
    cuts = next((n for n in range(1, most + 1) if _busy(items * n, num_threads) >= _BUSY), most)
    cut_keys = ceil(num_keys / cuts)
    return ceil(num_keys / cut_keys), cut_keys


def _busy(items: int, threads: int) -> float:
    return items / (ceil(items / threads) * threads)
