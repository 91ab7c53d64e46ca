"""What a run of the harness found: the one tree that every report is written from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spolia_fidelity.case_set import InputInfo
from spolia_fidelity.estimate import Estimate

ALL_TASKS = "all"
"""The task name of figures over every question of a run."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Where and how it was measured: what a figure is worth nothing without."""

    model: str
    """The model as the caller named it."""
    fingerprint: str
    """Hex of the model's fingerprint."""
    dtype: str
    """What the model computed in, for example "float32"."""
    seed: int
    """Fixes generated inputs, drawn distractors and resamples."""
    num_resamples: int
    """Bootstrap resamples behind every interval."""
    level: float
    """What the intervals are meant to cover, for example 0.95."""
    seconds: float
    """Wall time of the whole run."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Hardware, versions, commit: plain JSON values."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the caller asked for (`quick`, inputs, limits): plain JSON values."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One policy on one task, or on all (`ALL_TASKS`). Intervals resample clusters of cases (`bootstrap.py`)."""

    task: str
    num_questions: int
    num_scored_tokens: int
    nll: Estimate
    """Negative log-likelihood of the scored tokens, nats per token."""
    nll_increase: Estimate
    """Paired: this policy's minus full recompute's, nats per token. Positive is a loss."""
    kl_mean: Estimate
    """KL(full || policy) of next-token distributions, nats, mean over scored positions."""
    kl_p99: Estimate
    """The same, 99th percentile over scored positions."""
    agreement: Estimate
    """Share of scored positions where full recompute's first choice is also this policy's."""
    exact: Estimate | None = None
    """Share of questions answered exactly; None where the task has no exact match. Wilson interval."""
    loss_points: Estimate | None = None
    """Paired: percentage points of exact match that full recompute has over this policy. Positive is a loss."""
    f1: Estimate | None = None
    """Mean token F1 of generated answers; None where nothing was generated."""
    num_changed: int = 0
    """Questions right under one of the two (this policy, full recompute) and wrong under the other."""


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """One reuse policy: what it cost and what it lost."""

    name: str
    """As the caller writes it: "full", "naive", "link:16", "cacheblend:0.16"."""
    recomputed_tokens: int
    """Chunk tokens computed in place, over all cases. Live tokens are not counted: every policy computes those."""
    reused_tokens: int
    """Chunk tokens whose KV was read, over all cases."""
    seconds: float
    """Wall time of the policy's passes."""
    overall: Figures
    """Over all questions; `overall.task` is `ALL_TASKS`. Its exact match covers the questions that have one."""
    tasks: tuple[Figures, ...]
    """One per task, in the order tasks first appear in the cases."""

    @property
    def recomputed_share(self) -> float:
        """Share of chunk tokens computed in place: 1 for full recompute, 0 for naive reuse."""
        total = self.recomputed_tokens + self.reused_tokens
        return self.recomputed_tokens / total if total else 1.0

    def figures(self, task: str) -> Figures | None:
        """The figures of one task, `ALL_TASKS` included; None for a task this run does not have."""
        return next((figures for figures in (self.overall, *self.tasks) if figures.task == task), None)


@dataclass(frozen=True, slots=True)
class EvalResult:
    """A whole run."""

    run: RunInfo
    inputs: tuple[InputInfo, ...]
    policies: tuple[PolicyResult, ...]
    """In the order asked for; full recompute, the reference of every paired figure, is one of them."""
    notes: tuple[str, ...] = ()
    """Sentences a reader of the figures has to know, for example what was skipped or not measured."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks measured, without `ALL_TASKS`."""
        return tuple(figures.task for figures in self.policies[0].tasks) if self.policies else ()
