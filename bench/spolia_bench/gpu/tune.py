"""How the span kernel is best cut: every setting at points that are bound by memory and by products.

`python -m spolia_bench.gpu.tune PART NUM_PARTS` runs each setting of a part once, so that several processes fill
Triton's cache together; without arguments all are timed.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator

import torch

from spolia_bench.gpu.attention import GQA, MHA, Layer
from spolia_bench.gpu.batches import Heads, Point, planned, private_ranges, shared_ranges
from spolia_bench.gpu.timing import graphed, timed
from spolia_kernels import Partial
from spolia_kernels.paged import attend_spans
from spolia_kernels.paged.tuning import Tuning

CASES: list[tuple[str, Heads, Point, int, list[Tuning]]] = []
for warps, keys, stages in itertools.product((4, 8), (64, 128), (2, 3, 4)):
    CASES.append(("mha 1024x16384 tile 128", MHA, Point(1024, 16384, 0), 128, [Tuning(keys, warps, stages, 1)]))
for keys, stages, per in ((64, 2, 2), (64, 3, 2), (64, 3, 3), (64, 4, 2), (128, 2, 2)):
    CASES.append(("mha 1024x16384 tile 64", MHA, Point(1024, 16384, 0), 64, [Tuning(keys, 4, stages, per)]))
for keys, stages, per in ((32, 3, 4), (64, 2, 3), (64, 3, 2), (64, 4, 2), (64, 4, 1), (128, 2, 2), (128, 3, 1)):
    CASES.append(("mha 32x16384 tile 32", MHA, Point(32, 16384, 0), 32, [Tuning(keys, 4, stages, per)]))
for keys, stages, per in ((32, 3, 4), (32, 4, 4), (64, 2, 3), (64, 3, 2), (64, 4, 2), (128, 2, 2), (128, 3, 1)):
    CASES.append(("mha private 32x4096 tile 16", MHA, Point(32, 4096, 0), 16, [Tuning(keys, 4, stages, per)]))
for keys, warps, stages in ((64, 4, 3), (64, 8, 3), (128, 8, 2), (128, 4, 2)):
    CASES.append(("gqa8 1024x16384 tile 128", GQA, Point(1024, 16384, 0), 128, [Tuning(keys, warps, stages, 1)]))


def _runs(
    cases: list[tuple[str, Heads, Point, int, list[Tuning]]],
) -> Iterator[tuple[str, Tuning, float, Callable[[], object]]]:
    """Name, setting, floor operations and bytes as milliseconds are the caller's; what runs it."""
    for name, heads, point, tile, tunings in cases:
        layer = Layer(point, heads)
        ranges = private_ranges(point) if "private" in name else shared_ranges(point)
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        work = planned(ranges, point.rows, heads, tile, processors)
        shape = (work.num_parts, heads.num_q_heads)
        into = Partial(torch.zeros(*shape, heads.head_dim, device="cuda"), torch.zeros(*shape, device="cuda"))
        flops = 4.0 * point.rows * heads.num_q_heads * heads.head_dim * point.shared
        for t in tunings:
            yield (
                name,
                t,
                flops,
                lambda t=t, layer=layer, work=work, into=into: attend_spans(
                    layer.query, layer.kv, work, layer.tails.positions, layer.angles,
                    sm_scale=layer.sm_scale, into=into, tuned=t,
                ),
            )  # fmt: skip
        torch.cuda.empty_cache()


def main(argv: list[str]) -> None:
    """See the module."""
    if argv:
        part, num_parts = map(int, argv)
        for name, t, _, run in _runs(CASES[part::num_parts]):
            try:
                run()
                torch.cuda.synchronize()
            except Exception as error:  # noqa: BLE001 - a setting that does not fit is said below
                print("cannot", name, t, str(error)[:80])
        return
    for name, t, flops, run in _runs(CASES):
        try:
            ms = timed(graphed(run), repeats=10).median_ms
        except Exception as error:  # noqa: BLE001 - a setting may not fit shared memory
            print(name, t, "fails:", str(error)[:80])
            continue
        print(
            f"{name} {t.keys}/{t.num_warps}/{t.num_stages}/{t.per_processor}: {ms:.4f} ms, {flops / ms * 1e-9:.0f} TFLOP/s",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
