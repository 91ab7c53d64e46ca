"""What `make gpu` times, each a generator for a process of its own, which alone imports it: what one lacks, a package
say, the others have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

Row = dict[str, Any]
OF_ATTENTION = frozenset({"flashinfer", "flex"})
"""Sections that fill in columns of the attention points."""


def measured_rates() -> Iterator[Row]:
    """Copy bandwidth and matrix rate, which all floors are made of."""
    from spolia_bench.gpu.rates import measured

    yield from measured()


def sections(rates: Row, *, grid: bool) -> dict[str, Callable[[], Iterator[Row]]]:
    """By name, in order. `rates`: the row of `rates`."""
    return {
        "steps": partial(_steps, rates),
        "linked": partial(_linked, rates),
        "engine": _engine,
        "sampling": partial(_sampling, rates),
        "attention": partial(_attention, rates, grid),
        "flashinfer": partial(_flashinfer, grid),
        "flex": partial(_flex, grid),
    }


def _steps(rates: Row) -> Iterator[Row]:
    from spolia_bench.gpu import steps
    from spolia_bench.gpu.rates import Rates

    yield from steps.compare_all(Rates.of(rates))


def _linked(rates: Row) -> Iterator[Row]:
    from spolia_bench.gpu import linked, steps
    from spolia_bench.gpu.rates import Rates

    yield from linked.compare(steps.SHAPES[0], Rates.of(rates))


def _engine() -> Iterator[Row]:
    from spolia_bench.gpu import engine_steps, steps

    yield from engine_steps.compare(steps.SHAPES[0])


def _sampling(rates: Row) -> Iterator[Row]:
    from spolia_bench.gpu import sampling
    from spolia_bench.gpu.rates import Rates

    yield from sampling.compare(Rates.of(rates))


def _attention(rates: Row, grid: bool) -> Iterator[Row]:
    from spolia_bench.gpu import attention
    from spolia_bench.gpu.rates import Rates

    yield from attention.compare(Rates.of(rates), attention.points(grid=grid))


def _flashinfer(grid: bool) -> Iterator[Row]:
    from spolia_bench.gpu import attention, flashinfer_cascade

    yield from flashinfer_cascade.compare(attention.points(grid=grid))


def _flex(grid: bool) -> Iterator[Row]:
    from spolia_bench.gpu import attention, flex

    yield from flex.compare(attention.points(grid=grid))
