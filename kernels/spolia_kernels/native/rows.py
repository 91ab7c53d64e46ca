"""Which rows attend which keys: where queries are read and how they are turned, and where results go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spolia_kernels.native.vectors import I64, Value, Vectors

NO_KEYS: Value = I64(0)


@dataclass(frozen=True, slots=True)
class Keys:
    """`count` keys and values of one KV head, each at a distance from the one before, in floats."""

    key: Value
    key_token: Value
    value: Value
    value_token: Value
    count: Value
    following: Value = NO_KEYS
    """Keys that stand behind these and are attended next."""

    def key_at(self, v: Vectors, index: Value) -> Value:
        """The address of a key."""
        return v.builder.gep(self.key, [v.builder.mul(index, self.key_token)])

    def value_at(self, v: Vectors, index: Value) -> Value:
        """The address of a value."""
        return v.builder.gep(self.value, [v.builder.mul(index, self.value_token)])

    def part(self, v: Vectors, start: Value, most: int) -> Keys:
        """Those from `start` on, `most` at most."""
        left = v.builder.sub(self.count, start)
        count = v.smaller_int(left, I64(most))
        place = self.key_at(v, start), self.key_token, self.value_at(v, start), self.value_token
        return Keys(*place, count, v.builder.sub(left, count))


@dataclass(frozen=True, slots=True)
class Turn:
    """A rotation by halves: cosines and sines, `half` of each. Dimensions from 2 · half on stay as they are."""

    cos: Value
    sin: Value
    half: Value


@dataclass(frozen=True, slots=True)
class Rows:
    """`count` rows that attend the same keys. What is asked of a row is given its number, 0 … count - 1."""

    count: Value
    scale: Value
    """sm_scale · log2 e."""
    query: Callable[[Value], Value]
    """The address of its query."""
    out: Callable[[Value], Value]
    """The address of its output, dense."""
    lse: Callable[[Value], Value]
    """The address of the log of its sum."""
    turn: Callable[[Value], Turn] | None = None
    """How its query is turned; None where none is."""

    def read_query(self, v: Vectors, row: Value, head_dim: Value, write: Callable[[Value, Value], None]) -> None:
        """`write(dimension, number)` for every dimension of a row's query, turned and scaled."""
        build, source = v.builder, self.query(row)

        def scaled(d: Value, number: Value) -> None:
            write(d, build.fmul(number, self.scale))

        def as_it_is(d: Value, _: list[Value]) -> Sequence[Value]:
            scaled(d, v.load(source, d))
            return []

        if self.turn is None:
            v.loop(I64(0), head_dim, 1, [], as_it_is)
            return
        turn = self.turn(row)

        def pair(d: Value, _: list[Value]) -> Sequence[Value]:
            other = build.add(d, turn.half)
            first, second = v.load(source, d), v.load(source, other)
            cos, sin = v.load(turn.cos, d), v.load(turn.sin, d)
            scaled(d, build.fsub(build.fmul(first, cos), build.fmul(second, sin)))
            scaled(other, build.fadd(build.fmul(second, cos), build.fmul(first, sin)))
            return []

        v.loop(I64(0), turn.half, 1, [], pair)
        v.loop(build.add(turn.half, turn.half), head_dim, 1, [], as_it_is)
