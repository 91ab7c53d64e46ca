"""Rows over ranges that stand elsewhere for each of them, a layer in two calls: `SpanStep` of one decode row each of
many sequences, which also read slots of their own, and `SpanPass` of the rows of a pass, which also see each other.

CPU, float32, with machine code of our own (`spolia_kernels.native`): `native_cpu.py` and `span_pass.py`. Elsewhere
there is none, and either is put together from `attend`, `attend_private`, `attend_batch`, `rotate` and `merge`.
"""

from __future__ import annotations

from spolia_kernels.span_step.native_cpu import SpanStep, span_kernels
from spolia_kernels.span_step.reference import span_step_ref
from spolia_kernels.span_step.span_pass import SpanPass, pass_kernels
from spolia_kernels.span_step.spans import Heads, SlotRows, SpanRange

__all__ = [
    "Heads",
    "SlotRows",
    "SpanPass",
    "SpanRange",
    "SpanStep",
    "pass_kernels",
    "span_kernels",
    "span_step_ref",
]
