"""A step's attention row by row, in the words of its definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spolia_kernels.attend.reference import attend_ref
from spolia_kernels.merge.reference import merge_ref
from spolia_kernels.partial import Partial
from spolia_kernels.span_step.spans import SlotRows, SpanRange


def span_step_ref(
    slots: Sequence[SlotRows],
    ranges: Sequence[SpanRange],
    lens: Sequence[int],
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sm_scale: float,
) -> Tensor:
    """Computes `SpanStep` after `begin(lens)`; see there for shapes and meaning. Writes the rows' keys and values."""
    outs: list[Tensor] = []
    homes = [(each, number) for each in slots for number in range(each.num_rows)]
    for row, (home, number) in enumerate(homes):
        keys, values = home.key[layer, number], home.value[layer, number]
        keys[:, lens[row] - 1], values[:, lens[row] - 1] = key[:, row], value[:, row]
        q = query[:, row : row + 1]
        parts = [attend_ref(q, keys[:, : lens[row]], values[:, : lens[row]], sm_scale=sm_scale)]
        for each in ranges:
            for place, reader in enumerate(each.rows):
                if reader == row:
                    turned = q if each.turn is None else each.turn.row(place)(q)
                    parts.append(_over(each, layer, turned, sm_scale))
        outs.append(merge_ref(parts).out)
    return torch.cat(outs, 1)


def _over(each: SpanRange, layer: int, query: Tensor, sm_scale: float) -> Partial:
    return attend_ref(query, each.key[layer], each.value[layer], sm_scale=sm_scale)
