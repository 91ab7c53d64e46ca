"""FlashInfer's cascade at the same points: shared pages at one level, every row's own at the next.

Keys and queries count as rotated already, and the row's own key as written: less than what ours does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from spolia_bench.gpu.batches import DEVICE, Heads, Point
from spolia_bench.gpu.timing import figures, graphed, timed

PAGE = 16
WORKSPACE_BYTES = 256 << 20


def compare(at: Sequence[tuple[str, Heads, Point]]) -> Iterator[dict[str, Any]]:
    """The cascade's column, a row per point and head shape; `flashinfer_in_graph` says how it was called.

    First by calls in a row, of which the host's part may be most. Then each as a graph, which FlashInfer does not
    promise to be possible: the first that cannot be captured is the last that is tried, and what was measured stays.
    """
    failed = 0
    for name, heads, point in at:
        row: dict[str, Any] = {"heads": name, "point": str(point)}
        try:
            row |= figures("flashinfer", timed(cascade(point, heads), repeats=10, inner=5))
            row["flashinfer_in_graph"] = False
        except Exception as error:  # it compiles itself, which may fail in many ways: its column says so
            row["flashinfer_error"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            failed += 1
        torch.cuda.empty_cache()
        yield row
    if failed:
        return
    for name, heads, point in at:
        row = {"heads": name, "point": str(point)}
        try:
            row |= figures("flashinfer", timed(graphed(cascade(point, heads)), repeats=10))
            row["flashinfer_in_graph"] = True
        except RuntimeError as error:
            yield {**row, "flashinfer_graph_error": str(error).splitlines()[0][:120]}
            return
        torch.cuda.empty_cache()
        yield row


def cascade(point: Point, heads: Heads) -> Callable[[], object]:
    """One layer's attention. Raises ImportError where FlashInfer is not installed; compiles it the first time."""
    import flashinfer

    shared_pages, own = point.shared // PAGE, point.suffix + 1
    own_pages = -(-own // PAGE)
    total = shared_pages + point.rows * own_pages
    kv = torch.empty(total, 2, PAGE, heads.num_kv_heads, heads.head_dim, dtype=torch.bfloat16, device=DEVICE).normal_()
    query = torch.randn(point.rows, heads.num_q_heads, heads.head_dim, device=DEVICE).to(torch.bfloat16)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=DEVICE)
    wrapper: Any = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")

    def ints(values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=DEVICE)

    rows = torch.arange(point.rows + 1)
    wrapper.plan(
        [ints([0, point.rows]), ints(rows)],
        [ints([0, shared_pages]), ints(rows * own_pages)],
        [ints(torch.arange(shared_pages)), ints(torch.arange(shared_pages, total))],
        [ints([PAGE]), ints([own - (own_pages - 1) * PAGE] * point.rows)],
        heads.num_q_heads,
        heads.num_kv_heads,
        heads.head_dim,
        PAGE,
        q_data_type=torch.bfloat16,
    )
    return lambda: wrapper.run(query, kv)


if __name__ == "__main__":
    cascade(Point(32, 1024, 0), Heads(32, 4))()
    torch.cuda.synchronize()
