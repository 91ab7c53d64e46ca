"""What this machine does at the shapes of a pass, in single operators and without the system around them.

Time is processor time over threads: what an operator takes when its threads share it evenly and nobody else uses the
cores. On an idle machine that is the wall time, or a little less; on a busy one it stays so, and the wall time does
not. 161 rows, 512 → 2048, two threads on two cores, GFLOPS: idle 149 by the wall; beside six busy processes 64 by the
wall at the median and 139 by processor time.

The kernel counts a thread that is running on another core up to its last tick only, so a single short stretch may read
half of what was used: stretches last several ticks, and it is not the fastest that counts but one in the fast quarter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from spolia_bench.reuse.floor import Kind, Operator, Rates
from spolia_kernels import Linear, attend


@dataclass(frozen=True, slots=True)
class Care:
    """How well rates are measured."""

    num_stretches: int = 7
    """Of each operator."""
    min_stretch_s: float = 0.016
    """Of processor time per thread, in a stretch: four ticks of 4 ms."""
    stream_bytes: int = 256 << 20
    """Far beyond any cache of the machines this runs on."""


CAREFUL = Care()
CARELESS = Care(num_stretches=1, min_stretch_s=0.0005, stream_bytes=4 << 20)
"""For a quick run, which says that rates can be measured and not what they are."""


@torch.inference_mode()
def measure_rates(operators: Iterable[Operator], num_threads: int, care: Care = CAREFUL) -> Rates:
    """Measures every kind and shape among `operators` once, with `num_threads` torch threads; restores their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        shapes = {(o.kind, o.shape): o for o in operators}
        computed = {key: o for key, o in shapes.items() if o.kind is not Kind.BYTES}
        return Rates(
            {key: o.operations / _fastest_s(o, care) for key, o in computed.items()},
            {o.num_bytes: _moved_bytes_per_s(o.num_bytes, care) for o in shapes.values() if o.kind is Kind.BYTES},
            _stream_bytes_per_s(care),
        )
    finally:
        torch.set_num_threads(before)


def _fastest_s(operator: Operator, care: Care) -> float:
    """Seconds of an operator, the faster way counting: weights as torch has them or packed for this processor,
    attention by torch or by our kernels.
    """
    if operator.kind is not Kind.MATMUL:
        return min(_seconds_of(way, care) for way in _attention_of(operator))
    rows, num_in, num_out = operator.shape
    x, weight = torch.randn(rows, num_in), torch.randn(num_out, num_in)
    packed = Linear.of(weight)
    return min(_seconds_of(lambda: linear(x, weight), care), _seconds_of(lambda: packed(x), care))


def _attention_of(operator: Operator) -> tuple[Callable[[], object], Callable[[], object]]:
    heads, kv_heads, rows, keys, dim = operator.shape
    key, value = torch.randn(1, kv_heads, keys, dim), torch.randn(1, kv_heads, keys, dim)
    if operator.kind is Kind.CAUSAL:
        query = torch.randn(1, heads, rows, dim)
        is_grouped = heads != kv_heads
        return (
            lambda: scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=is_grouped),
            lambda: attend(query[0], key[0], value[0], sm_scale=dim**-0.5, causal=True),
        )
    # Rows of a GQA group stacked under their KV head: every key is read once.
    stacked = torch.randn(1, kv_heads, heads // kv_heads * rows, dim)
    return (
        lambda: scaled_dot_product_attention(stacked, key, value),
        lambda: attend(stacked[0], key[0], value[0], sm_scale=dim**-0.5),
    )


def _moved_bytes_per_s(num_bytes: int, care: Care) -> float:
    """Of a copy that reads one half and writes the other."""
    source = torch.randn(max(1, num_bytes // 8))
    target = torch.empty_like(source)
    return 8 * source.numel() / _seconds_of(lambda: target.copy_(source), care)


def _stream_bytes_per_s(care: Care) -> float:
    """The faster of reading alone and copying."""
    source = torch.randn(care.stream_bytes // 4)
    target = torch.empty_like(source)
    reading = care.stream_bytes / _seconds_of(source.sum, care)
    return max(reading, 2 * care.stream_bytes / _seconds_of(lambda: target.copy_(source), care))


def _seconds_of(work: Callable[[], object], care: Care) -> float:
    """Seconds of `work`, by processor time, in a fast stretch. Nothing else may run in this process."""
    num_threads = torch.get_num_threads()
    work()  # threads, caches, pages
    repeats = 1
    stretches: list[float] = []
    while len(stretches) < care.num_stretches:
        started = time.process_time()
        for _ in range(repeats):
            work()
        seconds = (time.process_time() - started) / num_threads
        if seconds >= care.min_stretch_s:
            stretches.append(seconds / repeats)
        else:
            repeats *= 2
    return sorted(stretches)[(care.num_stretches - 1) // 4]
