"""Attention on a CPU by our own machine code (`spolia_kernels.native`), where it is to be had and faster."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil

import torch
from torch import Tensor

from spolia_kernels.merge import merge
from spolia_kernels.native.attend_task import NUM_FIELDS, room_floats
from spolia_kernels.native.machine_code import NoMachineCodeError, lanes_here, task
from spolia_kernels.native.number_table import LOG2_E, NUMBERS
from spolia_kernels.native.team import parallel
from spolia_kernels.partial import Partial

_Fields = ctypes.c_int64 * NUM_FIELDS
_MAX_BLOCKS_PER_CHUNK = 4
_MIN_KEYS_PER_CUT = 512
_MIN_ROWS = 4
_BUSY = 0.85
"""Share of the threads' time that a division of the work should use, if it can."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel's function and how many rows it takes at a time."""

    address: int
    block_rows: int


@dataclass(frozen=True, slots=True)
class Native:
    """The kernels of this processor: `wide` for rows that fill two vectors and more, `narrow` for one."""

    wide: Kernel
    narrow: Kernel
    parallel: Callable[[int, object, int, int], None]

    def kernel_for(self, num_rows: int) -> Kernel:
        """The one that computes fewer rows that nobody asked for."""
        return min((self.wide, self.narrow), key=lambda kernel: -(-num_rows // kernel.block_rows) * kernel.block_rows)


@dataclass(frozen=True, slots=True)
class WhyNot:
    """There are no kernels here, and this is why."""

    reason: str


@cache
def native() -> Native | WhyNot:
    """The kernels, made at the first call: a third of a second each, once on a machine.

    `SPOLIA_NATIVE_KERNELS=0` in the environment turns them off.
    """
    if os.environ.get("SPOLIA_NATIVE_KERNELS") == "0":
        return WhyNot("turned off by SPOLIA_NATIVE_KERNELS=0")
    try:
        return native_of(lanes_here())
    except NoMachineCodeError as error:
        return WhyNot(str(error))


def native_of(lanes: int) -> Native:
    """The kernels with so many floats a vector, which the processor must have. Raises NoMachineCodeError."""
    wide, narrow = {16: (32, 16), 8: (16, 8), 4: (16, 8)}[lanes]
    return Native(Kernel(task("attend_wide", lanes), wide), Kernel(task("attend_narrow", lanes), narrow), parallel())


def native_for(query: Tensor, key: Tensor, value: Tensor) -> Native | None:
    """The kernels, where `attend_native` may be asked of tensors of agreeing shapes on a CPU and is the faster way."""
    if query.dtype != torch.float32 or query.shape[1] < _MIN_ROWS or query.numel() == 0 or key.numel() == 0:
        return None
    if not query.dtype == key.dtype == value.dtype or not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
        return None
    found = native()
    return found if isinstance(found, Native) else None


def attend_native(here: Native, query: Tensor, key: Tensor, value: Tensor, *, sm_scale: float) -> Partial:
    """Computes `attend` of query [num_kv_heads, num_rows, head_dim], the rows of a GQA group stacked, all float32 and
    dense in the last dimension, at least one row and one key.
    """
    num_heads, num_rows, head_dim = query.shape
    num_keys, v_dim = key.shape[1], value.shape[2]
    kernel, threads = here.kernel_for(num_rows), torch.get_num_threads()
    cut = Division.of(num_heads, num_rows, num_keys, kernel.block_rows, threads)
    out = query.new_empty(cut.num_cuts, num_heads, num_rows, v_dim)
    lse = query.new_empty(cut.num_cuts, num_heads, num_rows)
    floats = room_floats(cut.chunk_rows, kernel.block_rows, head_dim, v_dim)
    room = query.new_empty(threads * floats)
    numbers = _numbers(sm_scale)
    fields = _Fields(
        0,
        0,
        num_heads * cut.num_chunks * cut.num_cuts,
        num_heads,
        cut.num_chunks,
        cut.chunk_rows,
        num_rows,
        cut.cut_keys,
        num_keys,
        head_dim,
        v_dim,
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        key.data_ptr(),
        key.stride(0),
        key.stride(1),
        value.data_ptr(),
        value.stride(0),
        value.stride(1),
        out.data_ptr(),
        lse.data_ptr(),
        room.data_ptr(),
        floats,
        numbers.data_ptr(),
    )
    here.parallel(kernel.address, ctypes.byref(fields), threads, 0)
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
        """Chunks of whole blocks, as even as they come; cuts only where threads would have nothing to do."""
        num_blocks = ceil(num_rows / block_rows)
        chunk_blocks = ceil(num_blocks / ceil(num_blocks / _MAX_BLOCKS_PER_CHUNK))
        num_chunks = ceil(num_blocks / chunk_blocks)
        items = num_heads * num_chunks
        most = max(1, min(2 * num_threads, num_keys // _MIN_KEYS_PER_CUT))
        cuts = next((n for n in range(1, most + 1) if _busy(items * n, num_threads) >= _BUSY), most)
        cut_keys = ceil(num_keys / cuts)
        return cls(num_chunks, chunk_blocks * block_rows, ceil(num_keys / cut_keys), cut_keys)


def _busy(items: int, threads: int) -> float:
    return items / (ceil(items / threads) * threads)


@lru_cache(maxsize=16)
def _numbers(sm_scale: float) -> Tensor:
    return torch.tensor([*NUMBERS, sm_scale * LOG2_E], dtype=torch.float32)
