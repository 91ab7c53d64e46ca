"""FlashInfer's cascade at the same points: shared pages at one level, every row's own at the next.

Keys and queries count as rotated already, and the row's own key as written: less than what ours does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spolia_bench.gpu.batches import Heads, Point

PAGE = 16


def cascade(point: Point, heads: Heads) -> Callable[[], object]:
    """One layer's attention. Raises ImportError where FlashInfer is not installed; compiles it the first time."""
    import flashinfer

    shared_pages, own = point.shared // PAGE, point.suffix + 1
    own_pages = -(-own // PAGE)
    total = shared_pages + point.rows * own_pages
    kv = torch.empty(total, 2, PAGE, heads.num_kv_heads, heads.head_dim, dtype=torch.bfloat16, device="cuda").normal_()
    query = torch.randn(point.rows, heads.num_q_heads, heads.head_dim, device="cuda").to(torch.bfloat16)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper: Any = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")

    def ints(values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device="cuda")

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
