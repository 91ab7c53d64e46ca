"""What this machine can do, measured again in every round of a run.

A shared machine is not equally fast in every minute. So a time is held against the floor of its own round, measured
beside it; and, the stricter way, against the rates that any round reached.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from spolia_bench.model_shape import ModelShape
from spolia_bench.reuse.floor import Floor, Kind, Operator, Rates, floor_of
from spolia_bench.reuse.operators import Pass, link_pass, operators_of
from spolia_bench.reuse.rates import CAREFUL, Care, measure_rates
from spolia_core.prompt import Part, Prompt
from spolia_engine.link_plan import plan_link

K = TypeVar("K")


class Machine:
    """Rates at the shapes of the passes that were asked for, and their floors."""

    def __init__(self, shape: ModelShape, num_threads: int, care: Care = CAREFUL) -> None:
        self.shape = shape
        self._care = care
        self._num_threads = num_threads
        self._rates = Rates({}, {}, 0.0)
        self._now = self._rates

    def observe(self, works: Iterable[Pass]) -> None:
        """Measures now what these passes need."""
        operators = [operator for work in works for operator in operators_of(work, self.shape)]
        now, best = measure_rates(operators, self._num_threads, self._care), self._rates
        self._now = now
        self._rates = Rates(
            _best_of(best.operations_per_s, now.operations_per_s),
            _best_of(best.moved_bytes_per_s, now.moved_bytes_per_s),
            max(best.stream_bytes_per_s, now.stream_bytes_per_s),
        )

    def floor(self, work: Pass) -> Floor:
        """Of a pass that was observed, at the best rates of all rounds."""
        return floor_of(self.operators(work), self._rates)

    def floor_now(self, work: Pass) -> Floor:
        """Of a pass that was observed last, at the rates of that round."""
        return floor_of(self.operators(work), self._now)

    def operators(self, work: Pass) -> list[Operator]:
        """Of a pass."""
        return operators_of(work, self.shape)

    @property
    def stream_gb_per_s(self) -> float:
        """Memory bandwidth."""
        return self._rates.stream_bytes_per_s / 1e9

    def matmul_gflops(self, work: Pass) -> float:
        """Rate over all products of an observed pass."""
        operations = sum(o.operations * o.count for o in self.operators(work) if o.kind is Kind.MATMUL)
        return operations / self.floor(work).matmul_ms / 1e6


def linked_pass(num_documents: int, document_tokens: int, question_tokens: int, num_link_tokens: int) -> Pass:
    """The link pass of a prompt of begin-of-sequence token, documents and question, every document reused."""
    documents = [Part((0,) * document_tokens, index.to_bytes(32, "big")) for index in range(num_documents)]
    return link_pass(plan_link(Prompt((Part((0,)), *documents, Part((0,) * question_tokens))), num_link_tokens))


def _best_of(one: Mapping[K, float], other: Mapping[K, float]) -> dict[K, float]:
    return {key: max(one.get(key, 0.0), other.get(key, 0.0)) for key in one.keys() | other.keys()}
