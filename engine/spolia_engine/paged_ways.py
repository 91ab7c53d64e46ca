"""Attention over a device's slots as its decode steps run it, to be timed: rows that share a range, both ways."""

from __future__ import annotations

from collections.abc import Callable

import torch

from spolia_engine.cuda_graph import launching
from spolia_engine.device_work import WorkCutter
from spolia_kernels import Partial
from spolia_kernels.paged import Angles, PagedKv, Rows, SlotSpan, Tails, attend_spans, attend_tails


class PagedWays:
    """Layers of random KV, up to `max_rows` rows over up to `max_tokens` shared tokens."""

    def __init__(
        self,
        cutter: WorkCutter,
        *,
        head_dim: int,
        page_size: int,
        dtype: torch.dtype,
        num_layers: int,
        max_rows: int,
        max_tokens: int,
    ) -> None:
        self._cutter = cutter
        device, heads = cutter.device, cutter.num_kv_heads
        self._first_tail = -(-max_tokens // page_size)
        slots = (num_layers, heads, (self._first_tail + max_rows) * page_size, head_dim)
        key, value = (torch.randn(slots, device=device).to(dtype) for _ in range(2))
        self._layers = [PagedKv(k, v, page_size) for k, v in zip(key, value, strict=True)]
        self._num_q_heads = heads * cutter.group_size
        joined = torch.randn(max_rows, self._num_q_heads + 2 * heads, head_dim, device=device)
        self._rows = Rows.of(joined.to(dtype), self._num_q_heads)
        turned = torch.rand(max_tokens + 1, head_dim // 2, device=device)
        self._angles = Angles(turned.cos(), turned.sin())

    def attention(self, num_rows: int, num_tokens: int, *, shared: bool) -> Callable[[], object]:
        """All layers' attention of rows over a range and their newest token: on CUDA a graph's launch, as steps are.

        Elsewhere it returns what the rows of the last layer saw.
        """
        every, device = tuple(range(num_rows)), self._cutter.device
        readers = [every] if shared else [(row,) for row in every]
        spans = [SlotSpan(0, num_tokens, rows, (0,) * len(rows)) for rows in readers]
        work = self._cutter.cut(spans, num_rows, self._cutter.tile(num_rows))
        positions = torch.full((num_rows,), num_tokens, dtype=torch.int32, device=device)
        pages = torch.arange(self._first_tail, self._first_tail + num_rows, dtype=torch.int32, device=device)
        tails = Tails(pages[:, None], positions, positions)
        rows = self._rows.first(num_rows)
        partials = Partial(
            torch.zeros(work.num_parts, *rows.query.shape[1:], device=device),
            torch.zeros(work.num_parts, self._num_q_heads, device=device),
        )
        seen = torch.empty(rows.query.shape, dtype=rows.query.dtype, device=device)
        scale = rows.query.shape[2] ** -0.5

        def attend() -> torch.Tensor:
            for kv in self._layers:
                attend_spans(rows.query, kv, work, positions, self._angles, sm_scale=scale, into=partials)
                attend_tails(rows, kv, tails, partials, work, self._angles, sm_scale=scale, into=seen)
            return seen

        return launching(attend) if device.type == "cuda" else attend
