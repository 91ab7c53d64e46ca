"""Times on the device's own clock."""

from __future__ import annotations

from collections.abc import Callable

import torch

from spolia_bench.frame import Sample


def timed(run: Callable[[], object], *, repeats: int = 20, warm: int = 3, inner: int = 1) -> Sample:
    """Milliseconds of `run`, `repeats` of them, each the mean of `inner` calls in a row."""
    for _ in range(warm):
        run()
    pairs = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(inner):
            run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return Sample(tuple(start.elapsed_time(end) / inner for start, end in pairs))


def graphed(run: Callable[[], object]) -> Callable[[], None]:
    """`run` as a graph launch: what it costs without the host's share."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
