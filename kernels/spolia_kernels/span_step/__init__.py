"""Span step: one decode row each of many sequences over its own slot and the ranges it reads, a layer in two calls.

CPU, float32, with machine code of our own (`spolia_kernels.native`): `native_cpu.py`. Elsewhere there is none, and a
step is put together from `attend`, `attend_private`, `attend_batch`, `rotate` and `merge`.
"""

from __future__ import annotations

from spolia_kernels.span_step.native_cpu import SpanStep, span_kernels
from spolia_kernels.span_step.reference import span_step_ref
from spolia_kernels.span_step.spans import SlotRows, SpanRange

__all__ = ["SlotRows", "SpanRange", "SpanStep", "span_kernels", "span_step_ref"]
