"""The least time a pass can take here: sum over its operators of max(bytes / bandwidth, operations / rate).

**Counted.** Matrix products: 2 · rows · in · out operations; weights, inputs and outputs once each as bytes. Attention:
4 · query heads · pairs · head size operations, a pair being a row and a key it may see; queries, outputs, keys and
values once as bytes. Everything else (norms, rotation of queries and keys, activation, residual sums, embedding,
keeping the rows' KV) as bytes read and written, nothing for its arithmetic.

**Not counted**, since another implementation might do without: merging partials, rotating queries once per reused
fragment, Python, scheduling, messages, sampling. So the floor is of this model on this hardware, not of this system.

**Rates** are measured in the same run (`rates`), at each operator's own shape and with as many threads as the nodes
have: a fast one of several, in processor time. Operators overlap nowhere in the sum, as on a CPU they do not.

A pass is any list of operators (`operators`): a link pass, a prefill, a decode step of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What bounds an operator, and so what is measured for it."""

    MATMUL = "matmul"
    """Shape (rows, in, out)."""
    ATTENTION = "attention"
    """Every row sees every key. Shape (query heads, KV heads, rows, keys, head size)."""
    CAUSAL = "causal"
    """Row i sees keys 0 … i. Shape as for ATTENTION, with as many keys as rows."""
    BYTES = "bytes"
    """Moves bytes. Shape (bytes,)."""


@dataclass(frozen=True, slots=True)
class Operator:
    """`count` operators alike of a pass; `num_bytes` and `operations` are those of one."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    num_bytes: int
    operations: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True)
class Rates:
    """What this machine does, by kind and shape: operations per second, and bytes per second.

    `stream_bytes_per_s` is that of data larger than any cache: weights and keys. `moved_bytes_per_s` is by size: what
    an operator leaves behind for the next one is still in a cache when it is small.
    """

    operations_per_s: Mapping[tuple[Kind, tuple[int, ...]], float]
    moved_bytes_per_s: Mapping[int, float]
    stream_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Floor:
    """Milliseconds of a pass, by what they go to."""

    matmul_ms: float
    attention_ms: float
    other_ms: float

    @property
    def total_ms(self) -> float:
        """The floor."""
        return self.matmul_ms + self.attention_ms + self.other_ms


def seconds_of(operator: Operator, rates: Rates) -> float:
    """The least time of one of `operator`. KeyError for a shape that was not measured."""
    if operator.kind is Kind.BYTES:
        return operator.num_bytes / rates.moved_bytes_per_s[operator.shape[0]]
    computing = operator.operations / rates.operations_per_s[operator.kind, operator.shape]
    return max(operator.num_bytes / rates.stream_bytes_per_s, computing)


def floor_of(operators: Iterable[Operator], rates: Rates) -> Floor:
    """The floor of a pass."""
    sums = dict.fromkeys(Kind, 0.0)
    for operator in operators:
        sums[operator.kind] += 1e3 * operator.count * seconds_of(operator, rates)
    return Floor(sums[Kind.MATMUL], sums[Kind.ATTENTION] + sums[Kind.CAUSAL], sums[Kind.BYTES])
