"""`rms_norm`, `silu_mul` and `rotate`: what a layer does to each row by itself, between products and attention."""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from spolia_kernels.native.number_table import LOG2_E, MIN_EXPONENT
from spolia_kernels.native.task import Task
from spolia_kernels.native.tasks import RMS_NORM, ROTATE, SILU_MUL
from spolia_kernels.native.vectors import I64, Value


def rms_norm_module(lanes: int) -> ir.Module:
    """out = weight · x / sqrt(mean(x²) + epsilon); `width` is a multiple of `lanes`."""
    task = Task(lanes, RMS_NORM)
    fields, v = task.fields, task.v
    build, zero = v.builder, I64(0)

    def work(row: Value) -> None:
        width, inner = fields.int("width"), fields.int("inner")
        outer = build.mul(build.sdiv(row, inner), fields.int("x_outer"))
        place = build.add(outer, build.mul(build.srem(row, inner), fields.int("x_inner")))
        x = build.gep(fields.floats("x"), [place])
        out = build.gep(fields.floats("out"), [build.mul(row, width)])
        weight = fields.floats("weight")

        def square(d: Value, total: list[Value]) -> Sequence[Value]:
            number = v.load_vector(x, d)
            return [v.fma(number, number, total[0])]

        (total,) = v.loop(zero, width, lanes, [v.zero], square)
        mean = build.fmul(v.all_lanes(total, build.fadd), v.splat(fields.float("inverse_width")))
        shrink = build.fdiv(v.number(1.0), v.sqrt(build.fadd(mean, v.splat(fields.float("epsilon")))))

        def shrunk(d: Value, _: list[Value]) -> Sequence[Value]:
            number = build.fmul(v.load_vector(x, d), shrink)
            v.store_vector(build.fmul(number, v.load_vector(weight, d)), out, d)
            return []

        v.loop(zero, width, lanes, [], shrunk)

    return task.each_row(work)


def silu_mul_module(lanes: int) -> ir.Module:
    """out = up · gate / (1 + e^-gate); `width` is a multiple of `lanes`."""
    task = Task(lanes, SILU_MUL)
    fields, v = task.fields, task.v
    build = v.builder

    def work(row: Value) -> None:
        width, place = fields.int("width"), build.mul(row, fields.int("row"))
        gate, up = (build.gep(fields.floats(name), [place]) for name in ("gate", "up"))
        out = build.gep(fields.floats("out"), [build.mul(row, width)])
        top = build.fsub(v.zero, v.number(MIN_EXPONENT))

        def multiplied(d: Value, _: list[Value]) -> Sequence[Value]:
            number = v.load_vector(gate, d)
            power = build.fmul(build.fsub(v.zero, number), v.number(LOG2_E))
            gated = build.fdiv(number, build.fadd(v.number(1.0), v.exp2(power)))
            # Of gates below -87 the result is under 1e-36 of `up`: none is left.
            gated = build.select(build.fcmp_ordered(">", power, top), v.zero, gated)
            v.store_vector(build.fmul(gated, v.load_vector(up, d)), out, d)
            return []

        v.loop(I64(0), width, lanes, [], multiplied)

    return task.each_row(work)


def rotate_module(lanes: int) -> ir.Module:
    """Halves (a, b) of each head become (a cos - b sin, b cos + a sin), what is behind them stays; `half` and what is
    behind are multiples of `lanes`.
    """
    task = Task(lanes, ROTATE)
    fields, v = task.fields, task.v
    build, zero = v.builder, I64(0)

    def work(row: Value) -> None:
        head_dim, half, turn = fields.int("head_dim"), fields.int("half"), build.mul(row, fields.int("turn_row"))
        cos, sin = (build.gep(fields.floats(name), [turn]) for name in ("cos", "sin"))
        line = build.gep(fields.floats("x"), [build.mul(row, fields.int("x_row"))])
        num_heads = fields.int("num_heads")
        target = build.gep(fields.floats("out"), [build.mul(row, build.mul(num_heads, head_dim))])

        def head(index: Value, _: list[Value]) -> Sequence[Value]:
            x = build.gep(line, [build.mul(index, fields.int("x_head"))])
            out = build.gep(target, [build.mul(index, head_dim)])

            def pair(d: Value, _: list[Value]) -> Sequence[Value]:
                other = build.add(d, half)
                first, second = v.load_vector(x, d), v.load_vector(x, other)
                c, s = v.load_vector(cos, d), v.load_vector(sin, d)
                v.store_vector(build.fsub(build.fmul(first, c), build.fmul(second, s)), out, d)
                v.store_vector(build.fadd(build.fmul(second, c), build.fmul(first, s)), out, other)
                return []

            def as_it_is(d: Value, _: list[Value]) -> Sequence[Value]:
                v.store_vector(v.load_vector(x, d), out, d)
                return []

            v.loop(zero, half, lanes, [], pair)
            v.loop(build.add(half, half), head_dim, lanes, [], as_it_is)
            return []

        v.loop(zero, num_heads, 1, [], head)

    return task.each_row(work)
