"""Spolia's kernels: tensors in, tensors out, no knowledge of requests.

Each operation has a folder: `reference.py` says in plain torch what is computed, `cpu.py` computes it fast
where torch alone can, and `__init__.py` chooses by device and dtype and says which path runs when. Importing
this package needs torch only: no GPU, no Triton, no compiler.

The operations work on **partials**: attention over a set of keys split into parts is an exact merge of the
parts' partial results (`Partial`, `merge`), so every part may be computed on its own, wherever its keys lie.
"""

import os

# Weights and keys are read once a step, so pages of 4 KiB cost a look-up for every few microseconds of reading. torch
# asks for huge ones (madvise) where this says so when it first allocates. A decode step of 1 row behind 2,048 tokens:
# 21.7 → 19.9 ms, of 32 rows behind 4,096: 63.9 → 61.5; 60 M parameters, 2 threads, Intel Xeon.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from spolia_kernels.append_kv import append_kv
from spolia_kernels.attend import KeyRange, attend
from spolia_kernels.attend_batch import BatchLens, TailKeys, attend_batch
from spolia_kernels.attend_private import attend_private
from spolia_kernels.linear import NOT_MEASURED, FewRows, Linear, measured_few_rows
from spolia_kernels.merge import RowParts, merge, merge_into, merge_seen
from spolia_kernels.native.kernels import Kernels, WhyNot, kernels, prepare, torch_kernels_only
from spolia_kernels.partial import Partial
from spolia_kernels.read_kv import KeyValue, read_kv
from spolia_kernels.rotate import RotaryTable, Rotation, rotate
from spolia_kernels.span_step import Heads, SlotRows, SpanPass, SpanRange, SpanStep, pass_kernels, span_kernels

__all__ = [
    "NOT_MEASURED",
    "BatchLens",
    "FewRows",
    "Heads",
    "Kernels",
    "KeyRange",
    "KeyValue",
    "Linear",
    "Partial",
    "RotaryTable",
    "Rotation",
    "RowParts",
    "SlotRows",
    "SpanPass",
    "SpanRange",
    "SpanStep",
    "TailKeys",
    "WhyNot",
    "append_kv",
    "attend",
    "attend_batch",
    "attend_private",
    "kernels",
    "measured_few_rows",
    "merge",
    "merge_into",
    "merge_seen",
    "pass_kernels",
    "prepare",
    "read_kv",
    "rotate",
    "span_kernels",
    "torch_kernels_only",
]
