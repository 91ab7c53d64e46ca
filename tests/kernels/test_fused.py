"""The small fused operations against torch."""

from __future__ import annotations

import pytest
import torch

from spolia_kernels.fused.reference import add_rms_norm_ref, silu_mul_ref

launch = pytest.importorskip("spolia_kernels.fused.launch", reason="Triton has wheels for Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("width", [64, 96, 1000])
@pytest.mark.parametrize("adds", [True, False])
def test_norm_adds_and_norms(width: int, adds: bool) -> None:
    torch.manual_seed(0)
    hidden, delta = (torch.randn(3, width, device=DEVICE) for _ in range(2))
    weight = torch.randn(width, device=DEVICE)
    ours, theirs = hidden.clone(), hidden.clone()
    found = launch.add_rms_norm(ours, delta if adds else None, weight, 1e-5)
    expected = add_rms_norm_ref(theirs, delta if adds else None, weight, 1e-5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


@pytest.mark.parametrize("width", [10, 1024, 1500])
def test_gate_times_up(width: int) -> None:
    torch.manual_seed(1)
    gate_up = torch.randn(4, 2 * width, device=DEVICE)
    out = torch.empty(4, width, device=DEVICE)
    launch.silu_mul(gate_up, out)
    torch.testing.assert_close(out, silu_mul_ref(gate_up), atol=1e-5, rtol=1e-5)
