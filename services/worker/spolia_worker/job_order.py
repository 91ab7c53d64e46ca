"""Who uses the engine next: least-served tenant first, shortest job first within it, and nobody starves.

Pure: what is ready, what was served and how long each has waited come in; a choice goes out. So every order can be
replayed.

- Between tenants: the one that was served fewest tokens (Sheng et al., "Fairness in Serving Large Language Models",
  OSDI '24, virtual token counter). A tenant that comes, or comes back, starts no lower than those that stayed: idling
  earns no credit, and neither does waiting for data.
- Within a tenant: the job with the fewest tokens left, less `AGING_TOKENS_PER_S` for each second since it last ran,
  came, or had its data. Running takes the credit away. Hence two bounds for a job with n tokens left among others of
  its tenant: each one with more left has at most one slice before it; and once it has waited n / `AGING_TOKENS_PER_S`
  seconds, each of the others, shorter and newer ones too, has at most one slice before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

AGING_TOKENS_PER_S = 64.0
"""Credit for waiting. Larger: long jobs move sooner between short ones, which wait for more of their slices. It has to
be far less than an engine computes in a second: else equal long jobs run by turns, and all of them end when the last
does (16 prompts of 4,129 tokens at once, at 4096: the first token of each came after 168 s). With this one, a prompt of
8192 tokens gets a slice after two minutes from a tenant who sends short ones without end."""


@dataclass(frozen=True, slots=True)
class ReadyJob:
    """A job that could run now."""

    tenant_id: str
    tokens_left: int
    waited_s: float
    """Since it last ran, came, or had its data."""
    begun: bool = False
    """Whether it holds memory already."""

    @property
    def rank(self) -> float:
        """Smaller goes first."""
        return self.tokens_left - AGING_TOKENS_PER_S * self.waited_s


class ServedTokens:
    """The virtual counter of each tenant."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}
        self._active: frozenset[str] = frozenset()
        self._floor = 0

    def __getitem__(self, tenant_id: str) -> int:
        return max(self._tokens.get(tenant_id, 0), self._floor)

    @property
    def num_tenants(self) -> int:
        """Tenants whose counter is remembered."""
        return len(self._tokens)

    def serve(self, tenant_id: str, num_tokens: int) -> None:
        """Tokens were computed for a tenant."""
        self._tokens[tenant_id] = self[tenant_id] + num_tokens

    def take_back(self, tenant_id: str, num_tokens: int) -> None:
        """Tokens that were to be computed for a tenant were not."""
        self._tokens[tenant_id] = max(self._floor, self[tenant_id] - num_tokens)

    def activate(self, tenant_ids: AbstractSet[str]) -> None:
        """These tenants have ready jobs now, and no others. New ones start at the least of those that stayed.

        Where none stayed, at the least of those that left last: what a tenant used while nobody else wanted the engine
        is not held against it. Tenants that are gone and stand no higher than that are forgotten: they would start
        there anyway.
        """
        last = self._active & tenant_ids or self._active
        if last:
            self._floor = max(self._floor, min(self[tenant_id] for tenant_id in last))
        self._tokens = {
            tenant_id: max(tokens, self._floor)
            for tenant_id, tokens in self._tokens.items()
            if tenant_id in tenant_ids or tokens > self._floor
        }
        self._active = frozenset(tenant_ids)


def choose(jobs: Sequence[ReadyJob], served: ServedTokens) -> int:
    """Index of the job to run next, among at least one. The same arguments give the same answer.

    Ties go to jobs that have begun, then to earlier ones in `jobs`.
    """
    return min(
        range(len(jobs)),
        key=lambda i: (served[jobs[i].tenant_id], jobs[i].rank, not jobs[i].begun, i),
    )
