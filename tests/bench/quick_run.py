"""A benchmark, small, from the command line to the JSON line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parents[2] / "models" / "demo"


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    """The record of `python -m` with these arguments, run in `folder`."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, capture_output=True, text=True, timeout=570, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record
