"""What a process holds in memory, and what its model weighs."""

from __future__ import annotations

from pathlib import Path


def resident_mib(pid: int) -> float:
    """Resident memory of a process, in MiB, pages of files it maps included. Raises `OSError` without /proc."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"process {pid} has no resident memory: it has ended")


def weights_mib(model: Path) -> float:
    """Weights of a Hugging Face-format folder as its files hold them, in MiB."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors")) / 2**20
