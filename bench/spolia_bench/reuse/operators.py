"""Which operators a pass of a Llama-like model consists of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from spolia_bench.model_shape import ModelShape
from spolia_bench.reuse.floor import Kind, Operator
from spolia_engine.link_plan import LinkPlan


@dataclass(frozen=True, slots=True)
class Seen:
    """Rows that all see the same keys, besides what they see of each other."""

    num_rows: int
    num_keys: int


@dataclass(frozen=True, slots=True)
class Pass:
    """Rows that run through the model together.

    `causal_rows` are the sizes of groups whose rows see each other up to themselves: one group of all rows in a link
    pass or a prefill, none in a decode step. `num_logits` rows get logits.
    """

    num_rows: int
    seen: tuple[Seen, ...]
    causal_rows: tuple[int, ...] = ()
    num_logits: int = 1
    num_own_keys: int = 0
    """Keys that one row each sees, over all rows: read as bytes, which is all that one row does with them."""


def link_pass(plan: LinkPlan) -> Pass:
    """Recomputed rows over reused fragments: each sees the fragments before it, and the rows before it."""
    num_rows = len(plan.positions)
    seen = tuple(Seen(num_rows - f.first_row, f.end - f.start) for f in plan.fragments if f.first_row < num_rows)
    return Pass(num_rows, seen, (num_rows,))


def decode_step(num_rows: int, num_shared: int, num_own: int) -> Pass:
    """One row each of sequences that share `num_shared` tokens and have `num_own` of their own."""
    seen = (Seen(num_rows, num_shared),) if num_shared else ()
    return Pass(num_rows, seen, num_logits=num_rows, num_own_keys=num_rows * num_own)


def prefill_pass(num_tokens: int) -> Pass:
    """A whole prompt, nothing reused."""
    return Pass(num_tokens, (), (num_tokens,))


def operators_of(work: Pass, shape: ModelShape) -> list[Operator]:
    """Every operator of a pass, alike ones counted."""
    q_width, kv_width = shape.num_q_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    rows = work.num_rows
    linear = [(rows, shape.width, q_width), *[(rows, shape.width, kv_width)] * 2, (rows, q_width, shape.width)]
    linear += [*[(rows, shape.width, shape.mlp)] * 2, (rows, shape.mlp, shape.width)]
    products = Counter({size: count * shape.layers for size, count in Counter(linear).items()})
    products[(work.num_logits, shape.width, shape.vocab)] += 1
    operators = [_matmul(size, count, shape) for size, count in products.items()]
    operators += [
        _attention(Kind.ATTENTION, seen.num_rows, seen.num_keys, seen.num_rows * seen.num_keys, count, shape)
        for seen, count in Counter(work.seen).items()
    ]
    operators += [
        _attention(Kind.CAUSAL, size, size, size * (size + 1) // 2, count, shape)
        for size, count in Counter(work.causal_rows).items()
    ]
    if work.num_own_keys:
        size = 2 * kv_width * work.num_own_keys * shape.item_bytes
        operators.append(Operator("own keys", Kind.BYTES, (size,), size, 0, shape.layers))
    return operators + _moves(rows, q_width, kv_width, shape)


def _matmul(size: tuple[int, int, int], count: int, shape: ModelShape) -> Operator:
    rows, num_in, num_out = size
    numbers = num_in * num_out + rows * (num_in + num_out)
    return Operator(
        f"{num_in} → {num_out}", Kind.MATMUL, size, numbers * shape.item_bytes, 2 * rows * num_in * num_out, count
    )


def _attention(
    kind: Kind, num_rows: int, num_keys: int, num_pairs: int, count_per_layer: int, shape: ModelShape
) -> Operator:
    heads, kv_heads, dim = shape.num_q_heads, shape.num_kv_heads, shape.head_dim
    numbers = 2 * dim * (heads * num_rows + kv_heads * num_keys)
    size = (heads, kv_heads, num_rows, num_keys, dim)
    return Operator(
        f"{num_rows} rows, {num_keys} keys",
        kind,
        size,
        numbers * shape.item_bytes,
        4 * heads * dim * num_pairs,
        count_per_layer * shape.layers,
    )


def _moves(rows: int, q_width: int, kv_width: int, shape: ModelShape) -> list[Operator]:
    """Numbers read and written by what does little arithmetic, each operator's results being the next one's inputs."""
    per_layer: Sequence[tuple[str, int, int]] = (
        ("norm", 2 * shape.width, 2),
        ("rotation", 2 * (q_width + kv_width), 1),
        ("keeping KV", 4 * kv_width, 1),
        ("activation", 3 * shape.mlp, 1),
        ("residual sum", 3 * shape.width, 2),
    )
    moves = [(name, numbers, count * shape.layers) for name, numbers, count in per_layer]
    moves += [("embedding", 2 * shape.width, 1), ("last norm", 2 * shape.width, 1)]
    size = rows * shape.item_bytes
    return [Operator(name, Kind.BYTES, (numbers * size,), numbers * size, 0, count) for name, numbers, count in moves]
