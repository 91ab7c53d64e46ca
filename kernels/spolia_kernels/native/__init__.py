"""Machine code for this processor, written at a start by LLVM: what no library has, at the rate of a matrix product.

A kernel is a function in LLVM's intermediate language, built by `…_ir.py` with the few words of `vectors.py`.
`assemble.py` makes it machine code, in a process of its own that ends with it: LLVM takes 100 MB. `machine_code.py`
keeps what came of it in a folder and maps it; `team.py` runs it on the threads torch has. No compiler is needed, only
the `llvmlite` wheel; where that, or threads like torch's, are missing, `kernels.py` says why and torch's kernels are
used.

What builds kernels does not import torch, so that the process which assembles starts fast.
"""
