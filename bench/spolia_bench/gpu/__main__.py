"""`make gpu`: correctness first, then times. Says so, with exit status 0, where there is no CUDA device."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spolia_bench.gpu.kernels import errors
from spolia_bench.gpu.run import Run
from spolia_bench.gpu.tables import tables
from spolia_fidelity.environment import environment

TOTAL_S = 470.0
"""For everything, checks included."""
RATES_S = 40.0
SECTIONS_S = {"steps": 160.0, "linked": 60.0, "attention": 75.0, "flex": 100.0}
"""At most, in order; where less is left of the whole, the last get less."""
GRID_FACTOR = 4
"""How much longer all of it may take with the whole grid of attention points."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where a kernel is off, and then nothing is timed; also where a section did not come to its end."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--grid", action="store_true", help="all attention points, not the named 16")
    parser.add_argument("--only", choices=["kernels", *SECTIONS_S], help="one section")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: bench/results/gpu-DEVICE-COMMIT.json)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing checked")
        print(json.dumps({"bench": "gpu", "device": None, "environment": environment()}))
        return 0
    began = time.monotonic()
    where = environment()
    result: dict[str, Any] = {"bench": "gpu", "device": where["gpu"], "environment": where}
    run = Run(result, options.out or _path(where), began + TOTAL_S * (GRID_FACTOR if options.grid else 1))
    right = _check(run)
    if right and options.only != "kernels":
        right = _time(run, options)
    result["seconds"] = round(time.monotonic() - began, 1)
    run.save()
    print("\n".join(tables(result)))
    print(json.dumps(result))
    return 0 if right else 1


def _check(run: Run) -> bool:
    """Whether every kernel is right."""
    found = errors()
    run.result["kernels"] = [{"what": what, "error": error, "limit": limit} for what, error, limit in found]
    for what, error, limit in found:
        print(f"{what:55} {error:.2e} (at most {limit:.0e}){'' if error <= limit else '  OFF'}", flush=True)
    run.save()
    return all(error <= limit for _, error, limit in found)


def _time(run: Run, options: argparse.Namespace) -> bool:
    """Fills in what was asked for. Every section is tried, whatever became of those before it."""
    from spolia_bench.gpu import attention, linked, rates, steps  # not in each of the processes that check kernels

    if not run.section("rates", rates.measured, RATES_S):
        return False
    (row,) = run.result["rates"]
    found = rates.Rates(**row)
    run.result["rates"] = {"copy_tb_per_s": found.copy / 1e12, "matrix_tflop_per_s": found.matrix / 1e12}
    points = attention.GRID if options.grid else attention.NAMED
    sections = {
        "steps": partial(steps.compare_all, found),
        "linked": partial(linked.compare, steps.SHAPES[0], found),
        "attention": partial(attention.compare, found, points),
        "flex": partial(attention.compare_flex, points),
    }
    factor = GRID_FACTOR if options.grid else 1
    asked = [name for name in sections if options.only in (None, name)]
    ended = [run.section(name, sections[name], factor * SECTIONS_S[name]) for name in asked]
    return all(ended)


def _path(where: dict[str, Any]) -> Path:
    device = str(where["gpu"]).lower().replace("nvidia", "").strip().replace(" ", "-")
    return Path("bench/results") / f"gpu-{device}-{where['commit']}.json"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
