"""The tiny model and its worlds are shared with the tests of what these nodes have in common."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "worker"))

from worker_fixtures import model, world

__all__ = ["model", "world"]
