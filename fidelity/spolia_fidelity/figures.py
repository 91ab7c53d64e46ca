"""From outcomes of questions to the figures of policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spolia_core.errors import InvalidRequest
from spolia_fidelity.bootstrap import (
    DEFAULT_LEVEL,
    DEFAULT_RESAMPLES,
    ClusterBootstrap,
    Floats,
    Ints,
    design_effect,
    wilson,
)
from spolia_fidelity.estimate import Estimate
from spolia_fidelity.measures import Outcome
from spolia_fidelity.result import ALL_TASKS, Figures

POINTS = 100.0


@dataclass(frozen=True, slots=True)
class PolicyFigures:
    """Figures of one policy: over all questions, and per task in the order tasks first appear."""

    overall: Figures
    tasks: tuple[Figures, ...]


def figures_of(
    outcomes: Mapping[str, Sequence[Outcome]],
    reference: str = "full",
    *,
    seed: int,
    num_resamples: int = DEFAULT_RESAMPLES,
    level: float = DEFAULT_LEVEL,
) -> dict[str, PolicyFigures]:
    """Figures of every policy in `outcomes` (policy name to outcomes of all questions), paired with `reference`.

    Deterministic for a seed, whatever the order of a policy's outcomes. Raises `InvalidRequest` when there is no
    reference, no question, or a policy that did not answer exactly the reference's questions.
    """
    if reference not in outcomes:
        raise InvalidRequest(
            f"no policy {reference!r} to compare with", field="policies", limit=reference, actual=", ".join(outcomes)
        )
    if not outcomes[reference]:
        raise InvalidRequest("no questions were measured", field="cases", limit="≥ 1 question", actual="0")
    order = {outcome.key: place for place, outcome in enumerate(outcomes[reference])}
    aligned = {name: _aligned(name, found, order) for name, found in outcomes.items()}
    tasks = list(dict.fromkeys(outcome.task for outcome in aligned[reference]))
    per_task: dict[str, dict[str, Figures]] = {}
    for task in (ALL_TASKS, *tasks):
        rows = {
            name: [outcome for outcome in found if task in (ALL_TASKS, outcome.task)] for name, found in aligned.items()
        }
        bootstrap = ClusterBootstrap(
            [outcome.cluster for outcome in rows[reference]], seed=seed, num_resamples=num_resamples, level=level
        )
        per_task[task] = {
            name: _figures(task, found, rows[reference], bootstrap, level) for name, found in rows.items()
        }
    return {
        name: PolicyFigures(per_task[ALL_TASKS][name], tuple(per_task[task][name] for task in tasks))
        for name in outcomes
    }


def _aligned(name: str, found: Sequence[Outcome], order: Mapping[tuple[str, int], int]) -> list[Outcome]:
    if len(found) != len(order) or {outcome.key for outcome in found} != order.keys():
        raise InvalidRequest(
            f"policy {name!r} and the reference did not answer the same questions",
            field="outcomes",
            limit=f"{len(order)} questions, each once",
            actual=f"{len(found)} outcomes",
        )
    return sorted(found, key=lambda outcome: order[outcome.key])


def _figures(
    task: str, rows: Sequence[Outcome], full: Sequence[Outcome], bootstrap: ClusterBootstrap, level: float
) -> Figures:
    nlls = _floats([row.nll_sum for row in rows])
    full_nlls = _floats([row.nll_sum for row in full])
    tokens = _floats([row.num_tokens for row in rows])
    kls = _floats([kl for row in rows for kl in row.kls])
    kl_rows: Ints = np.repeat(np.arange(len(rows)), [len(row.kls) for row in rows])
    pairs = [(row, other) for row, other in zip(rows, full, strict=True) if row.exact is not None]
    return Figures(
        task=task,
        num_questions=len(rows),
        num_scored_tokens=int(tokens.sum()),
        nll=bootstrap.ratio(nlls, tokens),
        nll_increase=bootstrap.ratio(nlls - full_nlls, tokens),
        kl_mean=bootstrap.ratio(_floats([sum(row.kls) for row in rows]), tokens),
        kl_p99=bootstrap.percentile(kls, kl_rows, 99),
        agreement=bootstrap.ratio(_floats([row.num_agreed for row in rows]), tokens),
        exact=_share([row for row, _ in pairs], level) if pairs else None,
        loss_points=_loss(rows, full, bootstrap) if pairs else None,
        f1=_f1(rows, bootstrap),
        num_changed=sum(row.exact != other.exact for row, other in pairs),
    )


def _share(rows: Sequence[Outcome], level: float) -> Estimate:
    right = [bool(row.exact) for row in rows]
    effect = design_effect(right, [row.cluster for row in rows])
    return wilson(sum(right), len(right), level=level, design_effect=effect)


def _loss(rows: Sequence[Outcome], full: Sequence[Outcome], bootstrap: ClusterBootstrap) -> Estimate:
    lost = _floats([bool(other.exact) - bool(row.exact) for row, other in zip(rows, full, strict=True)])
    counted = _floats([row.exact is not None for row in rows])
    return bootstrap.ratio(lost * counted, counted).scaled(POINTS)


def _f1(rows: Sequence[Outcome], bootstrap: ClusterBootstrap) -> Estimate | None:
    counted = _floats([row.f1 is not None for row in rows])
    if not counted.any():
        return None
    return bootstrap.ratio(_floats([row.f1 or 0.0 for row in rows]), counted)


def _floats(values: Sequence[float]) -> Floats:
    return np.array(values, dtype=np.float64)
