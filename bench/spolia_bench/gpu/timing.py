"""Times on the device's own clock. Without a device on the host's: for tests, which run the code and quote no time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from spolia_bench.frame import Sample
from spolia_bench.gpu.batches import DEVICE
from spolia_engine.cuda_graph import launching


def timed(run: Callable[[], object], *, repeats: int = 20, warm: int = 3, inner: int = 1) -> Sample:
    """Milliseconds of `run`, `repeats` of them, each the mean of `inner` calls in a row."""
    for _ in range(warm):
        run()
    stretches = _on_device if DEVICE == "cuda" else _on_host
    return Sample(tuple(each / inner for each in stretches(run, repeats, inner)))


def figures(name: str, sample: Sample) -> dict[str, Any]:
    """Fields of a row: the median, and of how many times it is one."""
    return {f"{name}_ms": sample.median_ms, f"{name}_n": len(sample.values_ms)}


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a graph launch: what it costs without the host's share. Without a device `run` itself."""
    return launching(run) if DEVICE == "cuda" else run


def wait() -> None:
    """Until the device has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _on_device(run: Callable[[], object], repeats: int, inner: int) -> Iterator[float]:
    pairs = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(inner):
            run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    for start, end in pairs:
        yield float(start.elapsed_time(end))


def _on_host(run: Callable[[], object], repeats: int, inner: int) -> Iterator[float]:
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(inner):
            run()
        yield 1e3 * (time.perf_counter() - began)
