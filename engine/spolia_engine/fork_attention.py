"""Attention of many tails behind one context: shared ranges once for all rows, tails of like length side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spolia_engine.attention import VisibleRange, VisibleRanges
from spolia_engine.extent import Extent
from spolia_engine.run import SlotRange
from spolia_engine.side_by_side import SideBySide
from spolia_kernels import RotaryTable


class ForkAttention:
    """Rows of several tails, tail after tail: each sees the shared ranges whole, and its own tail at or before it.

    `tails` are the extents the tails' KV goes to, each as long as its tail, shortest first. Every shared range is
    attended once with the rows of all tails, whatever its offset. Source: Hydragen (2402.05099) §3.1-3.2, here for
    rows of a prefill and for ranges that stand where they were not computed.
    """

    def __init__(self, tails: Sequence[Extent], shared: Sequence[SlotRange], rotary: RotaryTable) -> None:
        self._tails = tuple(tails)
        self._lens = [extent.capacity for extent in tails]
        self._side_by_side = SideBySide(self._lens, rotary.device)
        self._shared = VisibleRanges((VisibleRange(slots, 0) for slots in shared), rotary)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Tensor:
        """Writes each tail's KV and returns the rows' attention, as `ContextAttention` does."""
        rows = zip(self._tails, torch.split(key, self._lens, 1), torch.split(value, self._lens, 1), strict=True)
        for extent, own_key, own_value in rows:
            extent.write(layer, 0, own_key, own_value)
        result = self._side_by_side.attend(query, key, value, sm_scale)
        self._shared.add_to(result, query, layer, sm_scale)
        return result.out.to(query.dtype)
