"""Which reused tokens deviate most from what full recompute would give: CacheBlend's choice of what to recompute.

Layer 0 is recomputed over the whole prompt. The deviation of a reused token is the squared difference between V of
layer 1 so computed and the chunk's own, summed over heads and dims; the share of them that deviates most is chosen.

Source: CacheBlend (2405.16444) §4. Like it: what is compared, and at which layer. Unlike it: one choice holds for all
layers, where the paper lets it shrink layer by layer; the pass that follows reuses layer 0 too, whose stored KV is
that of full recompute, depending on token and position alone; its row mask is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from spolia_core.errors import InvalidRequest, NotSupported
from spolia_core.prompt import Prompt
from spolia_engine.adapter import ModelAdapter
from spolia_engine.link_plan import check_runs
from spolia_engine.run import Run
from spolia_kernels import attend

DEVIATION_LAYER = 1
"""The first layer whose KV depends on more than token and position, and so the first that can deviate."""


def most_deviant(adapter: ModelAdapter, prompt: Prompt, runs: Mapping[int, Run], share: float) -> tuple[int, ...]:
    """Positions of the `share` of all tokens of `runs` that deviates most, ascending; see `EngineCore.most_deviant`.

    The number of tokens is rounded to the nearest; of equal deviations the earlier token is chosen.
    """
    if not 0.0 <= share <= 1.0:  # NaN too
        raise InvalidRequest(f"share is {share}, outside 0 … 1", field="share", limit="0 … 1", actual=str(share))
    if adapter.num_layers <= DEVIATION_LAYER:
        raise NotSupported(
            f"every layer: the model has {adapter.num_layers}; deviation is measured at layer {DEVIATION_LAYER}",
            field="num_hidden_layers",
            limit=f"≥ {DEVIATION_LAYER + 1}",
            actual=str(adapter.num_layers),
        )
    check_runs(prompt, runs)
    starts = [0, *accumulate(len(part.token_ids) for part in prompt.parts)]
    positions = [starts[i] + j for i, run in sorted(runs.items()) for j in range(run.num_tokens)]
    count = round(share * len(positions))
    if count == 0:
        return ()
    deviation = _value_deviation(adapter, prompt, runs, positions)
    # Stable: of equal deviations the earlier token comes first, on every machine.
    order = torch.sort(deviation, descending=True, stable=True).indices[:count]
    return tuple(sorted(positions[i] for i in order.tolist()))


@torch.inference_mode()
def _value_deviation(adapter: ModelAdapter, prompt: Prompt, runs: Mapping[int, Run], positions: list[int]) -> Tensor:
    """Squared difference of fresh and stored V at `DEVIATION_LAYER`, summed over heads and dims: float32, one each."""
    fresh = adapter.values_at(DEVIATION_LAYER, prompt.token_ids, range(prompt.num_tokens), _attend_rows)
    each = [run for _, run in sorted(runs.items())]
    stored = torch.cat(
        [run.extent.read(DEVIATION_LAYER, run.start, run.start + run.num_tokens)[1] for run in each], dim=1
    )
    chosen = fresh.index_select(1, torch.tensor(positions, device=fresh.device))
    return (chosen.float() - stored.float()).square().sum((0, 2))


def _attend_rows(layer: int, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Tensor:
    """Full causal attention of the rows over themselves; their KV is kept nowhere."""
    return attend(query, key, value, sm_scale=sm_scale, causal=True).out.to(query.dtype)
