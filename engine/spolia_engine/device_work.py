"""How a step's spans are cut for the device it runs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spolia_kernels.paged import PagedWork, SlotSpan, WorkShape, piece_keys, plan_work
from spolia_kernels.paged.tuning import tile_rows

MIN_KEYS = 16
"""The least that a piece is cut to."""


@dataclass(frozen=True, slots=True)
class WorkCutter:
    """Cuts work for attention of one shape on one device, for steps of up to so many rows."""

    num_kv_heads: int
    group_size: int
    device: torch.device

    def tile(self, num_rows: int) -> int:
        """Query rows of a tile in a step of so many rows."""
        return tile_rows(num_rows, self.group_size)

    def cut(self, spans: Sequence[SlotSpan], num_rows: int, tile: int) -> PagedWork:
        """Work of `num_rows` rows, in pieces that keep the device busy where the keys suffice for that."""
        per_tile = tile // self.group_size
        num_tiles = self.num_kv_heads * sum(-(-len(span.rows) // per_tile) for span in spans)
        longest = max((span.end - span.start for span in spans), default=0)
        keys = piece_keys(max(1, num_tiles), max(MIN_KEYS, longest), self._num_programs(tile))
        shape = WorkShape(self.num_kv_heads, self.group_size, tile, max(MIN_KEYS, keys))
        return plan_work(spans, num_rows, shape, self.device)

    def _num_programs(self, tile: int) -> int:
        if self.device.type != "cuda":
            return 4
        per_processor = 4 if tile <= 16 else 2  # as `span_tuning` lets them stay
        return per_processor * int(torch.cuda.get_device_properties(self.device).multi_processor_count)
