"""By which kernels an engine attends, and why."""

from __future__ import annotations

from dataclasses import dataclass

from spolia_engine.adapter import ModelAdapter
from spolia_kernels import WhyNot, prepare
from spolia_node.logs import get_log
from spolia_node.metrics import Metrics

log = get_log(__name__)

KERNELS = ("machine code", "torch", "triton")


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """One of `KERNELS`; `reason` where it is not the one that a device of its kind has at best."""

    kernels: str
    reason: str = ""

    @classmethod
    def of(cls, adapter: ModelAdapter) -> KernelChoice:
        """Makes what attends on a CPU, so that no request waits for it: a second, once on a machine."""
        if adapter.device.type != "cpu":
            return cls("triton")
        if adapter.compute_dtype != "float32":
            return cls("torch", f"machine code is for float32, the model is {adapter.compute_dtype}")
        found = prepare(adapter.kv_shape.head_dim, adapter.kv_shape.v_dim)
        return cls("torch", found.reason) if isinstance(found, WhyNot) else cls("machine code")

    def tell(self, metrics: Metrics) -> None:
        """To the log and to Prometheus."""
        log.info("attention", kernels=self.kernels, **({"reason": self.reason} if self.reason else {}))
        gauge = metrics.gauge(
            "spolia_attention_kernels", "1 for the kernels that the node attends with, 0 for others.", "kernels"
        )
        for kernels in KERNELS:
            gauge.labels(kernels).set(kernels == self.kernels)
