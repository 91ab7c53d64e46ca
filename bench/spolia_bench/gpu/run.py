"""A run's result, on disk as it grows: what is cut short leaves what it has."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spolia_bench.gpu.sections import OF_ATTENTION
from spolia_bench.gpu.watched import Row, watched


@dataclass(slots=True)
class Run:
    """`result` is saved at `path` after each row. A section that fails says why in its `errors`; others go on."""

    result: dict[str, Any]
    path: Path
    deadline: float
    """On the monotonic clock, for everything."""

    def save(self) -> None:
        """Writes what there is."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.result, indent=1) + "\n")

    def section(self, name: str, rows: Callable[[], Iterator[Row]], seconds: float) -> bool:
        """Runs a section in a process of its own, at most so long. Returns whether it came to its end."""
        seconds = min(seconds, self.deadline - time.monotonic())
        wrong = watched(rows, seconds, lambda row: self._add(name, row)) if seconds > 0 else "no time was left"
        if wrong is not None:
            self.result.setdefault("errors", {})[name] = wrong
            print(f"{name}: {wrong}", flush=True)
            self.save()
        return wrong is None

    def _add(self, name: str, row: Row) -> None:
        """Keeps a row; another's column of the attention points beside ours."""
        column = name in OF_ATTENTION
        rows = self.result.setdefault("attention" if column else name, [])
        same = [each for each in rows if column and all(each[key] == row[key] for key in ("heads", "point"))]
        if same:
            same[0].update(row)
        else:
            rows.append(row)
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        self.save()
