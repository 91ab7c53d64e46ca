"""Invented results of a run, for reports to show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from spolia_fidelity.case_set import InputInfo
from spolia_fidelity.estimate import Estimate
from spolia_fidelity.result import ALL_TASKS, EvalResult, Figures, PolicyResult, RunInfo

TASKS = ("fact", "cut", "pronoun", "two_hop")
CHUNK_TOKENS = 10_000
POLICIES: Mapping[str, tuple[float, float]] = {
    "full": (1.0, 0.0),
    "naive": (0.0, 24.0),
    "link:4": (0.031, 6.0),
    "link:16": (0.125, 0.4),
    "link:32": (0.25, 0.1),
    "sinks:4": (0.0, 17.0),
    "sinks:4+link:8": (0.062, 1.6),
    "cacheblend:0.16": (0.16, 3.0),
}
"""Name to share recomputed and points lost."""


def around(value: float, half: float) -> Estimate:
    return Estimate(value, value - half, value + half)


def figures(task: str, lost: float, *, exact: bool = True, spread: float = 1.0) -> Figures:
    half = 0.0 if lost == 0 else spread * (0.3 + abs(lost) / 8)
    return Figures(
        task=task,
        num_questions=500,
        num_scored_tokens=2500,
        nll=around(0.5 + lost / 60, 0.02),
        nll_increase=around(lost / 60, half / 60),
        kl_mean=around(abs(lost) / 80, half / 80),
        kl_p99=around(abs(lost) / 8, half / 8),
        agreement=Estimate(1 - abs(lost) / 150, 1 - abs(lost) / 120, 1 - abs(lost) / 200),
        exact=around(0.97 - lost / 100, 0.01) if exact else None,
        loss_points=around(lost, half) if exact else None,
        num_changed=round(abs(lost) * 6),
    )


def result(
    policies: Mapping[str, tuple[float, float]] = POLICIES,
    tasks: Sequence[str] = TASKS,
    *,
    texts: Sequence[str] = (),
    spread: float = 1.0,
) -> EvalResult:
    """Losses grow from task to task; `texts` are tasks without exact match."""
    found = []
    for name, (recomputed, lost) in policies.items():
        per_task = [figures(task, lost * (0.2 + 0.4 * i), spread=spread) for i, task in enumerate(tasks)]
        per_task += [figures(text, lost / 10, exact=False, spread=spread) for text in texts]
        found.append(
            PolicyResult(
                name=name,
                recomputed_tokens=round(CHUNK_TOKENS * recomputed),
                reused_tokens=CHUNK_TOKENS - round(CHUNK_TOKENS * recomputed),
                seconds=61.7,
                overall=figures(ALL_TASKS, lost, exact=bool(tasks), spread=spread),
                tasks=tuple(per_task),
            )
        )
    run = RunInfo(
        model="models/demo",
        fingerprint="0123456789abcdef" * 4,
        dtype="float32",
        seed=7,
        num_resamples=2000,
        level=0.95,
        seconds=371.2,
        environment={"cpu": "A processor", "cores": 2, "gpu": None, "torch": "2.13.0", "commit": "abcdef012345"},
        options={"quick": False, "texts": ["a.txt", "b.txt"], "qa": []},
    )
    inputs = (
        InputInfo("synthetic", "synthetic", 2000, 0, 500, 500, 2000, 4000, 512_000, 10_000),
        InputInfo("mus.json.gz", "musique", 150, 148, 2, 2, 2, 20, 16_182, 22, ("148 questions left out.",)),
    )
    return EvalResult(run, inputs, tuple(found), ("The model cannot do the task mus.",))


def without_intervals(value: EvalResult) -> EvalResult:
    """The same with intervals that the data do not hold."""
    from dataclasses import fields, replace

    def bare(part: Figures) -> Figures:
        found = {field.name: getattr(part, field.name) for field in fields(part)}
        none = {name: Estimate(e.value, math.nan, math.nan) for name, e in found.items() if isinstance(e, Estimate)}
        return replace(part, **none)

    policies = tuple(
        replace(policy, overall=bare(policy.overall), tasks=tuple(map(bare, policy.tasks))) for policy in value.policies
    )
    return replace(value, policies=policies)
