"""The Triton kernels compile for a device that this machine need not have: the interpreter forgives what the compiler
does not.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

SCRIPT = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from spolia_kernels.fused.fused_triton import add_rms_norm_kernel, silu_mul_kernel
from spolia_kernels.paged.append_triton import append_paged_kernel
from spolia_kernels.paged.attend_own_triton import attend_own_kernel
from spolia_kernels.paged.attend_spans_triton import attend_spans_kernel
from spolia_kernels.paged.attend_tails_triton import attend_tails_kernel
from spolia_kernels.paged.tuning import span_tuning
from spolia_kernels.sample.counter_triton import uniform_kernel
from spolia_kernels.sample.sample_triton import sample_kernel
from spolia_kernels.sample.summary_triton import summarize_kernel

SHARED, RESERVED = 228 * 1024, 1024  # bytes of a multiprocessor, and what each program on it costs besides its own
INTS = "items num_items rows offsets positions slots tail_pages tail_starts num_rows part_starts parts"
INTS += " top_ks highest chosen_strips few_keys few_ids"
POINTERS = {name: "*i32" for name in INTS.split()}
POINTERS |= {name: "*fp32" for name in "cos sin part_out part_lse part_tops part_sums part_masses logprobs".split()}
POINTERS |= {name: "i32" for name in "num_slots stride_row max_pages width".split()}
POINTERS |= {"sm_scale": "fp32", "eps": "fp32", "vocab": "i32", "count": "i32", "num_parts": "i32"}
POINTERS |= {name: "*fp64" for name in "temperatures top_ps numbers".split()}
POINTERS |= {name: "*i64" for name in "seeds sample_indices token_indices token_ids".split()}

def compiles(kernel, tensors="*bf16", options={}, descriptors={}, **constants):
    signature = {name: POINTERS.get(name, tensors) for name in kernel.arg_names} | descriptors
    signature |= dict.fromkeys(constants, "constexpr")
    built = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__name__, constants, "shared", built.metadata.shared)
    return built

for head_dim, tile in ((128, 64), (128, 16), (64, 64), (256, 16)):
    tuned = span_tuning(torch.empty(1, 1, head_dim, dtype=torch.bfloat16, device="meta"), tile)
    kind = {name: f"tensordesc<bf16[{tuned.keys}, {head_dim}]>" for name in ("key", "value")}
    common = dict(GROUP=4, HALF=head_dim // 2, PRECISION="tf32", KEYS=tuned.keys)
    options = {"num_warps": tuned.num_warps, "num_stages": tuned.num_stages}
    built = compiles(attend_spans_kernel, descriptors=kind, options=options, NUM_Q_HEADS=8, TILE=tile, **common)
    assert (built.metadata.shared + RESERVED) * tuned.per_processor <= SHARED, (head_dim, tile, built.metadata.shared)
    assert "cp.async.bulk.tensor" in built.asm["ptx"]
    assert ("wgmma.mma_async" in built.asm["ptx"]) == (tile >= 64)
for page in (16, 64):
    for group, tile in ((8, 8), (4, 4), (2, 2)):
        sizes = dict(GROUP=group, HALF=64, PAGE=page, TILE=tile, KEYS=16, PRECISION="tf32")
        one_warp = {"num_warps": 1, "num_stages": 2, "maxnreg": 128}
        compiles(attend_tails_kernel, options=one_warp, NUM_KV_HEADS=2, **sizes)
    compiles(attend_own_kernel, options={"num_warps": 1}, NUM_HEADS=2, HALF=64, PAGE=page, KEYS=16)
compiles(attend_tails_kernel, "*fp32", NUM_KV_HEADS=2, GROUP=7, HALF=32, PAGE=16, TILE=8, KEYS=16, PRECISION="ieee")
compiles(append_paged_kernel, HALF=64)
compiles(add_rms_norm_kernel, HAS_DELTA=True, WIDTH=1024)
compiles(silu_mul_kernel, BLOCK=1024)
for logits in ("*fp32", "*bf16"):
    kind = {"logits": logits}
    sizes = dict(STRIP=128, STRIPS=32)
    compiles(summarize_kernel, descriptors=kind, **sizes)
    sizes |= dict(NUM_STRIPS=1024, NUM_PARTS=32, FEW=64, CAPACITY=4096, LIST_BLOCK=1024, BLOCK=4096)
    compiles(sample_kernel, descriptors=kind, options={"num_warps": 16}, **sizes)
compiles(uniform_kernel, descriptors={"out": "*fp64"}, options={"num_warps": 1}, BLOCK=32)
"""


def test_every_kernel_compiles_for_hopper() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
