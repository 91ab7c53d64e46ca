"""How the paged kernels are best cut: every setting at points that are bound by memory, by products and by latency.

`python -m spolia_bench.gpu.tune PART NUM_PARTS` runs each setting of a part once, so that several processes fill
Triton's cache together; without arguments all are timed.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch

from spolia_bench.gpu.attention import GQA, MHA, Layer
from spolia_bench.gpu.batches import Heads, Point, planned, private_spans, shared_spans
from spolia_bench.gpu.timing import graphed, timed
from spolia_kernels import Partial
from spolia_kernels.paged import Tuning, attend_spans, attend_tails

Case = tuple[str, Heads, Point, int, Tuning]

SPANS = {
    ("mha 1024x16384", MHA, Point(1024, 16384, 0), 64): [(64, 4, 3, 2), (32, 4, 4, 2), (32, 4, 6, 2)],
    ("mha 1024x16384", MHA, Point(1024, 16384, 0), 128): [(64, 8, 3, 1), (64, 8, 4, 1), (128, 8, 3, 1)],
    ("mha 32x16384", MHA, Point(32, 16384, 0), 32): [(64, 4, 3, 2), (32, 4, 4, 2), (64, 2, 3, 2)],
    ("mha private 32x4096", MHA, Point(32, 4096, 0), 16): [(64, 4, 3, 2), (32, 2, 3, 4), (32, 1, 3, 6), (64, 2, 3, 2)],
}
TAILS = list(itertools.product((16, 32, 64), (1, 2, 4), (1, 2, 5), (None, 128)))
"""A page's id is a load before the load: of 5 stages, two steps' keys are on their way, of 2 one's."""


def _cases() -> Iterator[Case]:
    for (name, heads, point, tile), settings in SPANS.items():
        for keys, warps, stages, per in settings:
            yield name, heads, point, tile, Tuning(keys, warps, stages, per)
    for name, heads, point in (
        ("tails mha 1024+128", MHA, Point(1024, 1024, 128)),
        ("tails mha 1024+0", MHA, Point(1024, 1024, 0)),
        ("tails gqa8 1024+128", GQA, Point(1024, 1024, 128)),
        ("tails gqa4 1024+32", Heads(32, 8), Point(1024, 1024, 32)),
    ):
        for keys, warps, stages, registers in TAILS:
            if keys < 64 or warps > 1:
                yield name, heads, point, 0, Tuning(keys, warps, stages, max_registers=registers)


def _runs(cases: list[Case]) -> Iterator[tuple[Case, Callable[[], object]]]:
    before, layer, made = None, None, None
    for case in cases:
        name, heads, point, tile, tuned = case
        if (name, tile) != before:
            layer = made = None
            torch.cuda.empty_cache()
            layer = Layer(point, heads)
            spans = private_spans(point) if "private" in name else shared_spans(point)
            processors = torch.cuda.get_device_properties(0).multi_processor_count
            work = planned(spans, point.rows, heads, tile or 128, processors)
            shape = (work.num_parts, heads.num_q_heads)
            into = Partial(torch.zeros(*shape, heads.head_dim, device="cuda"), torch.zeros(*shape, device="cuda"))
            made, before = (work, into), (name, tile)
        assert layer is not None
        assert made is not None
        work, into = made
        common = {"sm_scale": layer.sm_scale, "tuned": tuned}
        if tile:
            yield (
                case,
                partial(
                    attend_spans,
                    layer.rows.query,
                    layer.kv,
                    work,
                    layer.tails.positions,
                    layer.angles,
                    into=into,
                    **common,
                ),
            )
        else:
            yield case, partial(attend_tails, layer.rows, layer.kv, layer.tails, into, work, layer.angles, **common)


def main(argv: list[str]) -> None:
    """See the module."""
    cases = list(_cases())
    if argv:
        part, num_parts = map(int, argv)
        for _, run in _runs(cases[part::num_parts]):
            try:
                run()
                torch.cuda.synchronize()
            except Exception as error:  # said again when it is timed
                print("cannot", str(error)[:60])
        return
    for (name, heads, point, tile, t), run in _runs(cases):
        try:
            ms = timed(graphed(run), repeats=10).median_ms
        except Exception as error:  # a setting may not fit shared memory
            print(name, t, "fails:", str(error)[:60])
            continue
        flops = 4.0 * point.rows * heads.num_q_heads * heads.head_dim * point.shared
        rate = f"{flops / ms * 1e-9:.0f} TFLOP/s" if tile else ""
        cut = f"{t.keys}/{t.num_warps}/{t.num_stages}/{t.per_processor}/{t.max_registers or '-'}"
        print(f"{name} {tile} {cut} {ms:.4f} {rate}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
