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
    difference_high,
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


@dataclass(frozen=True, slots=True)
class TaskLoss:
    """What one policy lost on one task, as a bound is held against it."""

    task: str
    num_clusters: int
    """Independent contexts that hold a question of this task with an exact match."""
    points: Estimate
    """Paired percentage points; the upper end is the bootstrap's or the difference of two Wilson intervals'."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What bounds are held against, of one policy over one source of cases."""

    num_clusters: int
    nll_increase: Estimate
    """Nats per scored token, with the upper end of `ClusterBootstrap.bounded_ratio`."""
    losses: tuple[TaskLoss, ...]
    """One per task with an exact match, in the order tasks first appear."""


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
    reference, no question, a task named as `ALL_TASKS`, or a policy that did not answer exactly the reference's
    questions.
    """
    aligned = _all_aligned(outcomes, reference)
    tasks = list(dict.fromkeys(outcome.task for outcome in aligned[reference]))
    per_task: dict[str, dict[str, Figures]] = {}
    for task in (ALL_TASKS, *tasks):
        rows = {
            name: [outcome for outcome in found if task in (ALL_TASKS, outcome.task)] for name, found in aligned.items()
        }
        bootstrap = _bootstrap(rows[reference], seed, num_resamples, level)
        per_task[task] = {
            name: _figures(task, found, rows[reference], bootstrap, level) for name, found in rows.items()
        }
    return {
        name: PolicyFigures(per_task[ALL_TASKS][name], tuple(per_task[task][name] for task in tasks))
        for name in outcomes
    }


def evidence_of(
    outcomes: Mapping[str, Sequence[Outcome]],
    reference: str = "full",
    *,
    seed: int,
    num_resamples: int = DEFAULT_RESAMPLES,
    level: float = DEFAULT_LEVEL,
) -> dict[str, Evidence]:
    """What bounds are held against, of every policy in `outcomes`, which are those of one source.

    The figures are those of `figures_of`, the upper ends more careful. Raises what `figures_of` raises.
    """
    aligned = _all_aligned(outcomes, reference)
    full = aligned[reference]
    whole = _bootstrap(full, seed, num_resamples, level)
    places: dict[str, list[int]] = {}
    for place, outcome in enumerate(full):
        if outcome.exact is not None:
            places.setdefault(outcome.task, []).append(place)
    per_task = {
        task: _bootstrap([full[place] for place in found], seed, num_resamples, level) for task, found in places.items()
    }
    return {
        name: Evidence(
            whole.num_clusters,
            whole.bounded_ratio(_nlls(rows) - _nlls(full), _tokens(rows)),
            tuple(
                TaskLoss(
                    task,
                    bootstrap.num_clusters,
                    _bounded_loss([rows[p] for p in places[task]], [full[p] for p in places[task]], bootstrap, level),
                )
                for task, bootstrap in per_task.items()
            ),
        )
        for name, rows in aligned.items()
    }


def _all_aligned(outcomes: Mapping[str, Sequence[Outcome]], reference: str) -> dict[str, list[Outcome]]:
    if reference not in outcomes:
        raise InvalidRequest(
            f"no policy {reference!r} to compare with", field="policies", limit=reference, actual=", ".join(outcomes)
        )
    if not outcomes[reference]:
        raise InvalidRequest("no questions were measured", field="cases", limit="≥ 1 question", actual="0")
    named = next((outcome for outcome in outcomes[reference] if outcome.task == ALL_TASKS), None)
    if named is not None:
        raise InvalidRequest(
            f"case {named.case!r} has a task named {ALL_TASKS!r}, the name of all tasks together",
            field="task",
            limit="another name",
            actual=ALL_TASKS,
        )
    order = {outcome.key: place for place, outcome in enumerate(outcomes[reference])}
    return {name: _aligned(name, found, order) for name, found in outcomes.items()}


def _bootstrap(rows: Sequence[Outcome], seed: int, num_resamples: int, level: float) -> ClusterBootstrap:
    return ClusterBootstrap([row.cluster for row in rows], seed=seed, num_resamples=num_resamples, level=level)


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
    nlls, full_nlls, tokens = _nlls(rows), _nlls(full), _tokens(rows)
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


def _bounded_loss(
    rows: Sequence[Outcome], full: Sequence[Outcome], bootstrap: ClusterBootstrap, level: float
) -> Estimate:
    """As `_loss`, of questions that all have an exact match; the upper end holds for few and rare losses too."""
    found = _loss(rows, full, bootstrap)
    lost = [bool(other.exact) and not row.exact for row, other in zip(rows, full, strict=True)]
    gained = [bool(row.exact) and not other.exact for row, other in zip(rows, full, strict=True)]
    high = POINTS * difference_high(lost, gained, [row.cluster for row in full], level=level)
    return Estimate(found.value, found.low, max(found.high, high) if found.has_interval else found.high)


def _f1(rows: Sequence[Outcome], bootstrap: ClusterBootstrap) -> Estimate | None:
    counted = _floats([row.f1 is not None for row in rows])
    if not counted.any():
        return None
    return bootstrap.ratio(_floats([row.f1 or 0.0 for row in rows]), counted)


def _nlls(rows: Sequence[Outcome]) -> Floats:
    return _floats([row.nll_sum for row in rows])


def _tokens(rows: Sequence[Outcome]) -> Floats:
    return _floats([row.num_tokens for row in rows])


def _floats(values: Sequence[float]) -> Floats:
    return np.array(values, dtype=np.float64)
