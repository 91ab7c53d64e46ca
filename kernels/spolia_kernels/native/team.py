"""torch's own threads, for functions that are not torch's.

torch's CPU builds for Linux compute on OpenMP threads. A compiled `#pragma omp parallel` calls the OpenMP library with
a function and its argument; so does this. A second team of threads would wait for cores that torch's still hold,
since they look for work some milliseconds before they sleep.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

from spolia_kernels.native.machine_code import NoMachineCodeError

_LIBRARIES = ("libgomp", "libiomp5", "libomp")
"""All of them export GCC's entry."""


@cache
def parallel() -> Any:
    """`parallel(function, argument, num_threads, 0)`: each thread calls the function, at an address, with the argument.
    Returns when all have. The interpreter is not held meanwhile. Raises NoMachineCodeError.
    """
    if not torch.backends.openmp.is_available():
        raise NoMachineCodeError("torch's threads are not OpenMP's")
    inside = str(Path(torch.__file__).parent)
    found = sorted(set(_loaded()), key=lambda path: not path.startswith(inside))
    for path in found:
        entry = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
        if entry is not None:
            entry.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            entry.restype = None
            return entry
    raise NoMachineCodeError(f"no GOMP_parallel in {found or 'any loaded library'}")


def _loaded() -> list[str]:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError as error:
        raise NoMachineCodeError(f"loaded libraries cannot be listed: {error}") from error
    paths = [line.split(maxsplit=5)[5] for line in lines if line.count("/")]
    return [path for path in paths if Path(path).name.startswith(_LIBRARIES)]
