"""What this machine does at the shapes of a pass, in torch's own operators and without the system around them.

Wall time, the best of several. A busy neighbour makes it longer, so a run says how busy the machine was, and a floor
that any answer beat is void. (Processor time over threads was tried: in windows of a millisecond it is counted too
coarsely, and its best was twice what the machine can do.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from spolia_bench.reuse.floor import Kind, Operator, Rates

BEST_OF = 9
MIN_SECONDS = 0.004
"""A measurement repeats its operator until it lasts this long, so that clocks and calls do not show."""
STREAM_BYTES = 256 << 20
"""Far beyond any cache of the machines this runs on."""


@torch.inference_mode()
def measure_rates(operators: Iterable[Operator], num_threads: int, best_of: int = BEST_OF) -> Rates:
    """Measures every kind and shape among `operators` once, with `num_threads` torch threads; restores their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        shapes = {(o.kind, o.shape): o for o in operators}
        computed = {key: o for key, o in shapes.items() if o.kind is not Kind.BYTES}
        return Rates(
            {key: o.operations / _best(_work_of(o), best_of) for key, o in computed.items()},
            {o.num_bytes: _moved_bytes_per_s(o.num_bytes, best_of) for o in shapes.values() if o.kind is Kind.BYTES},
            _stream_bytes_per_s(best_of),
        )
    finally:
        torch.set_num_threads(before)


def _work_of(operator: Operator) -> Callable[[], object]:
    if operator.kind is Kind.MATMUL:
        rows, num_in, num_out = operator.shape
        x, weight = torch.randn(rows, num_in), torch.randn(num_out, num_in)
        return lambda: linear(x, weight)
    heads, kv_heads, rows, keys, dim = operator.shape
    key, value = torch.randn(1, kv_heads, keys, dim), torch.randn(1, kv_heads, keys, dim)
    if operator.kind is Kind.CAUSAL:
        query = torch.randn(1, heads, rows, dim)
        is_grouped = heads != kv_heads
        return lambda: scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=is_grouped)
    # Rows of a GQA group stacked under their KV head: every key is read once.
    stacked = torch.randn(1, kv_heads, heads // kv_heads * rows, dim)
    return lambda: scaled_dot_product_attention(stacked, key, value)


def _moved_bytes_per_s(num_bytes: int, best_of: int) -> float:
    """Of a copy that reads one half and writes the other."""
    source = torch.randn(max(1, num_bytes // 8))
    target = torch.empty_like(source)
    return 8 * source.numel() / _best(lambda: target.copy_(source), best_of)


def _stream_bytes_per_s(best_of: int) -> float:
    """The faster of reading alone and copying."""
    source = torch.randn(STREAM_BYTES // 4)
    target = torch.empty_like(source)
    few = max(1, best_of // 6)  # each takes long
    reading = STREAM_BYTES / _best(source.sum, few)
    return max(reading, 2 * STREAM_BYTES / _best(lambda: target.copy_(source), few))


def _best(work: Callable[[], object], best_of: int) -> float:
    """Seconds of the fastest of `best_of` measurements."""
    work()  # threads, caches, pages
    repeats, best = 1, float("inf")
    for _ in range(best_of):
        while True:
            started = time.perf_counter()
            for _ in range(repeats):
                work()
            seconds = time.perf_counter() - started
            if seconds >= MIN_SECONDS:
                break
            repeats *= 2
        best = min(best, seconds / repeats)
    return best
