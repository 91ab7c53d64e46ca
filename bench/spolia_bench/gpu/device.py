"""Which device a run was on, and what it ran there: beside `environment`, what figures of a device are worth little
without.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = {"triton": "triton", "flashinfer": "flashinfer-python"}


def device_report() -> dict[str, Any]:
    """The first CUDA device as plain JSON values; None for a package that is not installed."""
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "l2_mib": round(found.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda,
        **{name: _version(package) for name, package in PACKAGES.items()},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
