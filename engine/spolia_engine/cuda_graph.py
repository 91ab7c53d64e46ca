"""Work as a CUDA graph: its launches recorded once, then one launch for all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch


def captured(work: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
    """`work` as a graph that `replay` launches. Runs it meanwhile. The graph holds none of the memory that `work` was
    given: keep that for as long as it is launched.

    `pool` is the memory of other graphs (torch's handle), none of which runs at the same time.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # kernels compile, libraries take their workspaces
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        work()
    return graph


def launching(work: Callable[[], object]) -> Callable[[], None]:
    """`work` as one launch, which keeps `work`, and so the memory that is read and written."""
    return partial(_launch, captured(work), work)


def _launch(graph: torch.cuda.CUDAGraph, work: Callable[[], object]) -> None:
    graph.replay()
