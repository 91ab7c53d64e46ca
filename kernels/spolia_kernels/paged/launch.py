"""Launches the paged kernels. Imports Triton."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from spolia_kernels.paged.append_triton import append_paged_kernel
from spolia_kernels.paged.attend_own_triton import attend_own_kernel
from spolia_kernels.paged.attend_spans_triton import attend_spans_kernel
from spolia_kernels.paged.attend_tails_triton import attend_tails_kernel
from spolia_kernels.paged.memory import PagedKv
from spolia_kernels.paged.reference import Angles, Rows, Tails
from spolia_kernels.paged.tuning import Tuning
from spolia_kernels.paged.work import PagedWork
from spolia_kernels.partial import Partial


def attend_spans(
    query: Tensor,
    kv: PagedKv,
    work: PagedWork,
    positions: Tensor,
    angles: Angles,
    sm_scale: float,
    into: Partial,
    tuned: Tuning,
) -> None:
    """See `spolia_kernels.paged.attend_spans`."""
    capacity = work.items.shape[0]
    if not capacity:
        return
    half = kv.head_dim // 2
    num_programs = min(capacity, _num_processors(query.device) * tuned.per_processor)
    attend_spans_kernel[(num_programs,)](
        query,
        TensorDescriptor.from_tensor(kv.key.view(-1, kv.head_dim), [tuned.keys, 2 * half]),
        TensorDescriptor.from_tensor(kv.value.view(-1, kv.head_dim), [tuned.keys, 2 * half]),
        kv.num_slots,
        work.items,
        work.num_items,
        work.rows,
        work.offsets,
        positions,
        angles.cos,
        angles.sin,
        into.out,
        into.lse,
        sm_scale,
        query.stride(0),
        NUM_Q_HEADS=query.shape[1],
        GROUP=query.shape[1] // kv.num_kv_heads,
        HALF=half,
        TILE=work.tile,
        KEYS=tuned.keys,
        PRECISION=_precision(query),
        num_warps=tuned.num_warps,
        num_stages=tuned.num_stages,
    )


def attend_tails(
    rows: Rows,
    kv: PagedKv,
    tails: Tails,
    partials: Partial,
    work: PagedWork,
    angles: Angles,
    sm_scale: float,
    into: Tensor,
    num_rows: Tensor | None,
    tuned: Tuning,
) -> None:
    """See `spolia_kernels.paged.attend_tails`."""
    query = rows.query
    group = query.shape[1] // kv.num_kv_heads
    assert query.stride(0) == rows.key.stride(0) == rows.value.stride(0), "queries, keys and values at one stride"
    entries = {tails.positions.shape[0], tails.starts.shape[0], work.part_starts.shape[0] - 1}
    assert min(entries) >= query.shape[0], "programs read a row's entries before they know whether it is there"
    common = (
        query,
        rows.key,
        rows.value,
        kv.key,
        kv.value,
        kv.num_slots,
        tails.pages,
        tails.starts,
        tails.positions,
        _all_rows(query.shape[0], query.device) if num_rows is None else num_rows,
        work.part_starts,
        work.parts,
        partials.out,
        partials.lse,
        angles.cos,
        angles.sin,
        into,
        sm_scale,
        query.stride(0),
        tails.pages.stride(0),
    )
    sizes = {
        "HALF": kv.head_dim // 2,
        "PAGE": kv.page_size,
        "KEYS": tuned.keys,
        "num_warps": tuned.num_warps,
        "num_stages": tuned.num_stages,
        "maxnreg": tuned.max_registers,
    }
    grid = (query.shape[0], kv.num_kv_heads)
    if group == 1:
        attend_own_kernel[grid](*common, NUM_HEADS=kv.num_kv_heads, **sizes)
    else:
        attend_tails_kernel[grid](
            *common,
            NUM_KV_HEADS=kv.num_kv_heads,
            GROUP=group,
            TILE=1 << (group - 1).bit_length(),
            PRECISION=_precision(query),
            **sizes,
        )


def append_paged(key: Tensor, value: Tensor, kv: PagedKv, slots: Tensor, positions: Tensor, angles: Angles) -> None:
    """See `spolia_kernels.paged.append_paged`."""
    assert key.stride(0) == value.stride(0), "new keys and values lie at one stride"
    append_paged_kernel[(key.shape[0], kv.num_kv_heads)](
        key,
        value,
        kv.key,
        kv.value,
        kv.num_slots,
        slots,
        positions,
        angles.cos,
        angles.sin,
        key.stride(0),
        HALF=kv.head_dim // 2,
        num_warps=1,
    )


def _precision(query: Tensor) -> str:
    """Float32 is computed as such; 16-bit products are exact anyway."""
    return "ieee" if query.dtype == torch.float32 else "tf32"


@cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter runs one program after the other
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _all_rows(num_rows: int, device: torch.device) -> Tensor:
    return torch.tensor([num_rows], dtype=torch.int32, device=device)
