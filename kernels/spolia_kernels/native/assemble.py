"""Kernels made machine code, in a process of its own that writes it to standard output.

What is written is bare code, begun by its one function: it may lie at any address, calls nothing and reads no data
but what it is told. That a kernel needs none is checked here, and else nothing is written.
"""

from __future__ import annotations

import sys

import llvmlite.binding as llvm
from llvmlite import ir

from spolia_kernels.native.attend_ir import attend_blocks, attend_few
from spolia_kernels.native.block_rows import Tiling
from spolia_kernels.native.rows_ir import rms_norm_module, rotate_module, silu_mul_module
from spolia_kernels.native.step_ir import merge_module, step_module


class NotBareError(Exception):
    """Machine code that needs more than itself."""


def tiling_of(lanes: int, *, wide: bool) -> Tiling:
    """What the registers of a processor with so many floats a vector hold. `wide`: two vectors of rows, else one."""
    if lanes == 16:  # 32 registers
        return Tiling(lanes, 2, 8, 8) if wide else Tiling(lanes, 1, 16, 16)
    if lanes == 8:  # 16 registers
        return Tiling(lanes, 2, 6, 4) if wide else Tiling(lanes, 1, 8, 8)
    return Tiling(lanes, 4, 4, 4) if wide else Tiling(lanes, 2, 8, 8)  # 32 registers


def kernel_module(kernel: str, lanes: int) -> ir.Module:
    """A kernel by its name and sizes, with so many floats a vector. Raises ValueError for others."""
    name, *sizes = kernel.split("-")
    match name, [int(size) for size in sizes]:
        case "attend_wide", []:
            return attend_blocks(tiling_of(lanes, wide=True))
        case "attend_narrow", []:
            return attend_blocks(tiling_of(lanes, wide=False))
        case "attend_few", [head_dim, v_dim]:
            return attend_few(lanes, head_dim, v_dim)
        case "step", [head_dim, v_dim, block_lanes, is_wide]:
            return step_module(lanes, tiling_of(block_lanes, wide=bool(is_wide)), head_dim, v_dim)
        case "merge", [v_dim]:
            return merge_module(lanes, v_dim)
        case "rms_norm", [row_lanes]:
            return rms_norm_module(row_lanes)
        case "silu_mul", [row_lanes]:
            return silu_mul_module(row_lanes)
        case "rotate", [row_lanes]:
            return rotate_module(row_lanes)
        case _:
            raise ValueError(f"no kernel {kernel}")


def machine_code(kernel: str, lanes: int) -> bytes:
    """The code of a kernel for this processor, its function first. Raises NotBareError."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    # A loop that writes zeros stays one: there is no memset to call. llvmlite has no word for that.
    text = str(kernel_module(kernel, lanes)).replace(
        'define void @"task"(i64* %".1")', 'define void @"task"(i64* %".1") "no-builtins"'
    )
    module = llvm.parse_assembly(text)
    module.verify()
    features = llvm.get_host_cpu_features()
    features["prefer-256-bit"] = False  # some processors would rather not use the vectors asked for
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3, reloc="pic", codemodel="small"
    )
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    # Loops are written as they should be.
    options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
    passes = llvm.create_pass_builder(target, options)
    passes.getModulePassManager().run(module, passes)
    sections = llvm.ObjectFileRef.from_data(target.emit_object(module)).sections()
    data = {bytes(section.name() or b""): bytes(section.data()) for section in sections if section.size()}
    needed = [name for name in data if name.startswith((b".rela.text", b".rel.text", b".rodata"))]
    if needed:
        raise NotBareError(f"{kernel} needs {needed}")
    return data[b".text"]


def main() -> None:
    """`assemble <lanes> <kernel> …`: of each kernel the length, eight bytes, and the code."""
    lanes, *kernels = sys.argv[1:]
    for kernel in kernels:
        code = machine_code(kernel, int(lanes))
        sys.stdout.buffer.write(len(code).to_bytes(8, "little") + code)
