"""The words kernels are written in: vectors of one register's floats, loops, loads, 2^x and log2 x.

A thin layer over llvmlite's builder. Numbers come from a table in memory and not from the code: machine code without
data of its own can lie anywhere (`assemble.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from spolia_kernels.native.number_table import EXP2, EXPONENT_BIAS, LANE_NUMBERS, LOG2_E, MAGIC, MIN_EXPONENT, NUMBERS

F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
FLOATS, INTS = F32.as_pointer(), I64.as_pointer()

_UNIT = 4
"""Lanes that processors can move about without being told where to by a table: 128 bits."""

Value = Any
"""A value of LLVM's: a number, a vector or an address while the kernel runs."""


class Vectors:
    """Writes what `builder` builds. `lanes` floats are a vector; every address counts in floats."""

    def __init__(self, module: ir.Module, builder: ir.IRBuilder, numbers: Value, lanes: int) -> None:
        """`numbers` is the address of `NUMBERS`. The builder stands where they may be read."""
        self.lanes = lanes
        self.builder = builder
        self._module = module
        self._vector = ir.VectorType(F32, lanes)
        self._ints = ir.VectorType(I32, lanes)
        # Read once, before anything else.
        self._scalars = {number: self.load(numbers, I64(index)) for index, number in enumerate(NUMBERS)}
        self._numbers = {number: self.splat(scalar) for number, scalar in self._scalars.items()}
        self.lane_numbers = self.load_vector(numbers, I64(NUMBERS.index(LANE_NUMBERS[0])))

    def number(self, value: float) -> Value:
        """A vector of one of `NUMBERS`."""
        return self._numbers[value]

    def scalar(self, value: float) -> Value:
        """One of `NUMBERS`."""
        return self._scalars[value]

    @property
    def zero(self) -> Value:
        """A vector of zeros."""
        return ir.Constant(self._vector, [0.0] * self.lanes)

    def splat(self, scalar: Value) -> Value:
        """A vector of one number."""
        nothing = ir.Constant(self._vector, ir.Undefined)
        first = self.builder.insert_element(nothing, scalar, I32(0))
        return self.builder.shuffle_vector(first, nothing, ir.Constant(self._ints, [0] * self.lanes))

    def load(self, base: Value, index: Value) -> Value:
        """The float at an index."""
        return self.builder.load(self.builder.gep(base, [index]), align=4)

    def store(self, scalar: Value, base: Value, index: Value) -> None:
        """Writes one float."""
        self.builder.store(scalar, self.builder.gep(base, [index]), align=4)

    def load_vector(self, base: Value, index: Value) -> Value:
        """The vector from an index on."""
        return self.builder.load(self._vector_at(base, index), align=4)

    def store_vector(self, vector: Value, base: Value, index: Value) -> None:
        """Writes a vector."""
        self.builder.store(vector, self._vector_at(base, index), align=4)

    def prefetch(self, base: Value, index: Value) -> None:
        """Asks for the cache line that an index is in; it need not be there."""
        build = self.builder
        byte = ir.IntType(8).as_pointer()
        name = "llvm.prefetch.p0"
        found = self._module.globals.get(name)
        if found is None:
            found = ir.Function(self._module, ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32]), name)
        build.call(found, [build.bitcast(build.gep(base, [index]), byte), I32(0), I32(2), I32(1)])

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a · b + c."""
        name = f"llvm.fma.v{self.lanes}f32"
        found = self._module.globals.get(name)
        if found is None:
            found = ir.Function(self._module, ir.FunctionType(self._vector, [self._vector] * 3), name)
        return self.builder.call(found, [a, b, c])

    def sqrt(self, x: Value) -> Value:
        """The root of each."""
        name = f"llvm.sqrt.v{self.lanes}f32"
        found = self._module.globals.get(name)
        if found is None:
            found = ir.Function(self._module, ir.FunctionType(self._vector, [self._vector]), name)
        return self.builder.call(found, [x])

    def larger(self, a: Value, b: Value) -> Value:
        """The larger of each pair; b where a is not a number."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def any(self, flags: Value) -> Value:
        """Whether any lane of a comparison is true."""
        bits = ir.IntType(self.lanes)
        return self.builder.icmp_unsigned("!=", self.builder.bitcast(flags, bits), bits(0))

    def all_lanes(self, x: Value, joined: Callable[[Value, Value], Value]) -> Value:
        """All lanes of x joined to one, in every lane."""
        step = self.lanes // 2
        while step:
            size = self.lanes if step >= _UNIT else _UNIT  # whole units change places, then lanes of a unit
            turned = [lane // size * size + (lane + step) % size for lane in range(self.lanes)]
            x = joined(x, self._picked(x, x, turned))
            step //= 2
        return x

    def sums_of(self, vectors: Sequence[Value]) -> Value:
        """Lane i is the sum over vector i, of as many vectors as there are lanes.

        Two vectors become one that holds half as many sums of each, the first one's before the second one's: first in
        every unit, then by units. Such moves are part of an instruction; others would read where from out of a table.
        """
        assert len(vectors) == self.lanes, "a lane for each"
        while len(vectors) > 1:
            in_units = len(vectors) > self.lanes // _UNIT
            vectors = [self._halved(a, b, in_units) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        return vectors[0]

    def exp2(self, x: Value) -> Value:
        """2^x of x ≤ 127 to 2e-7 of it; of x < -126 what -126 gives, of no number none."""
        build = self.builder
        bottom = self.number(MIN_EXPONENT)
        x = build.select(build.fcmp_ordered("<", x, bottom), bottom, x)
        # Added to 1.5 · 2^23, x is rounded to an integer, which is then what the sum's lowest bits say.
        shifted = build.fadd(x, self.number(MAGIC))
        rest = build.fsub(x, build.fsub(shifted, self.number(MAGIC)))
        power = self.number(EXP2[0])
        for coefficient in EXP2[1:]:
            power = self.fma(power, rest, self.number(coefficient))
        exponent = build.shl(build.bitcast(shifted, self._ints), ir.Constant(self._ints, [23] * self.lanes))
        return build.bitcast(build.add(build.bitcast(power, self._ints), exponent), self._vector)

    def log2(self, x: Value) -> Value:
        """log2 x of 1 ≤ x < 2^60, by Newton's steps y + (x · 2^-y - 1) · log2 e from the exponent on."""
        build = self.builder
        bits = build.bitcast(x, self._ints)
        exponent = build.ashr(bits, ir.Constant(self._ints, [23] * self.lanes))
        y = build.fsub(build.sitofp(exponent, self._vector), self.number(EXPONENT_BIAS))
        for _ in range(5):
            miss = build.fsub(build.fmul(x, self.exp2(build.fsub(self.zero, y))), self.number(1.0))
            y = self.fma(miss, self.number(LOG2_E), y)
        return y

    def loop(
        self,
        start: Value,
        end: Value,
        step: int,
        carried: Sequence[Value],
        body: Callable[[Value, list[Value]], Sequence[Value]],
    ) -> list[Value]:
        """`for i in range(start, end, step)`: `body` is given i and the carried values, and returns their next ones.
        Returns the last ones.
        """
        build = self.builder
        before = build.block
        head, inside, after = (build.append_basic_block() for _ in range(3))
        build.branch(head)
        build.position_at_end(head)
        index = build.phi(I64)
        index.add_incoming(start, before)
        values: list[Value] = []
        for first in carried:
            value = build.phi(first.type)
            value.add_incoming(first, before)
            values.append(value)
        build.cbranch(build.icmp_signed("<", index, end), inside, after)
        build.position_at_end(inside)
        following = body(index, values)
        index.add_incoming(build.add(index, I64(step)), build.block)
        for value, next_value in zip(values, following, strict=True):
            value.add_incoming(next_value, build.block)
        build.branch(head)
        build.position_at_end(after)
        return values

    def smaller_int(self, a: Value, b: Value) -> Value:
        """The smaller of two integers."""
        return self.builder.select(self.builder.icmp_signed("<", a, b), a, b)

    def _halved(self, a: Value, b: Value, in_units: bool) -> Value:
        """Neighbours of a and of b summed."""
        lanes = range(self.lanes)
        if in_units:
            both = [
                [unit + lane for unit in (first, first + self.lanes) for lane in range(_UNIT)]
                for first in lanes[::_UNIT]
            ]
            even, odd = ([lane for unit in both for lane in unit[first::2]] for first in (0, 1))
        else:
            units = [list(range(first, first + _UNIT)) for first in range(0, 2 * self.lanes, _UNIT)]
            even, odd = ([lane for unit in units[first::2] for lane in unit] for first in (0, 1))
        return self.builder.fadd(self._picked(a, b, even), self._picked(a, b, odd))

    def _picked(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        return self.builder.shuffle_vector(a, b, ir.Constant(self._ints, list(lanes)))

    def _vector_at(self, base: Value, index: Value) -> Value:
        return self.builder.bitcast(self.builder.gep(base, [index]), self._vector.as_pointer())
