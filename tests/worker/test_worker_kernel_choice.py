"""A node says by which kernels it attends, and why it has no better ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from spolia_core.chunk_object import KvShape
from spolia_kernels import Kernels, kernels, torch_kernels_only
from spolia_node.metrics import Metrics
from spolia_worker.kernel_choice import KERNELS, KernelChoice


def adapter(dtype: str = "float32", device: str = "cpu") -> SimpleNamespace:
    shape = KvShape(2, 2, 16, 16, "F32")
    return SimpleNamespace(device=torch.device(device), compute_dtype=dtype, kv_shape=shape)


@pytest.mark.skipif(not isinstance(kernels(), Kernels), reason="no machine code is to be had here")
def test_float32_on_a_cpu_is_attended_by_machine_code() -> None:
    assert KernelChoice.of(adapter()) == KernelChoice("machine code")


def test_what_is_not_is_said_with_its_reason() -> None:
    assert KernelChoice.of(adapter("bfloat16")).reason == "machine code is for float32, the model is bfloat16"
    assert KernelChoice.of(adapter(device="cuda")) == KernelChoice("triton")
    with torch_kernels_only():
        assert KernelChoice.of(adapter()) == KernelChoice("torch", "turned off for a while")


@pytest.mark.parametrize("chosen", KERNELS)
def test_one_of_them_is_told_to_prometheus(chosen: str) -> None:
    metrics = Metrics()
    KernelChoice(chosen).tell(metrics)
    found = {name: metrics.value("spolia_attention_kernels", kernels=name) for name in KERNELS}
    assert found == {name: float(name == chosen) for name in KERNELS}
