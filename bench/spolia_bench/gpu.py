"""`make gpu`: what a CUDA device can check of this release. Says so, with exit status 0, where there is none."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch

from spolia_fidelity.environment import environment
from spolia_kernels import Partial, RotaryTable, attend, merge, rotate


def main(argv: Sequence[str] | None = None) -> int:
    """Checks the kernels on the device against float64 on the CPU; 1 when one is off."""
    if not torch.cuda.is_available():
        print("no CUDA device: nothing checked")
        print(json.dumps({"bench": "gpu", "device": None, "environment": environment()}))
        return 0
    errors = {dtype: _attend_error(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    limits = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
    figures = {f"attend_max_error_{str(dtype).removeprefix('torch.')}": error for dtype, error in errors.items()}
    print(json.dumps({"bench": "gpu", **figures, "environment": environment()}))
    return 0 if all(errors[dtype] < limits[dtype] for dtype in errors) else 1


def _attend_error(dtype: torch.dtype) -> float:
    """Largest error of two merged, rotated partials on the device against one attend in float64."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(h, n, 64, generator=generator)
        for h, n in (
            (
                8,
                7,
            ),
            (2, 1000),
            (2, 1000),
        )
    )
    exact = attend(query.double(), key.double(), value.double(), sm_scale=0.125).out
    on_device = [t.to("cuda", dtype) for t in (query, key, value)]
    table = RotaryTable(torch.ones(32) * 0.1, head_dim=64, max_position=4096, device="cuda")
    shift = torch.full((7,), 1000, device="cuda")
    turned = rotate(rotate(on_device[0], shift, table), -shift, table)
    parts: list[Partial] = [
        attend(turned, on_device[1][:, part], on_device[2][:, part], sm_scale=0.125)
        for part in (slice(0, 333), slice(333, None))
    ]
    return float((merge(parts).out.double().cpu() - exact).abs().max())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
