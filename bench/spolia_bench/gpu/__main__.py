"""`make gpu`: correctness first, then times. Says so, with exit status 0, where there is no CUDA device."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from spolia_bench.gpu.device import device_report
from spolia_bench.gpu.kernels import errors
from spolia_bench.gpu.run import Run
from spolia_bench.gpu.sections import measured_rates, sections
from spolia_bench.gpu.tables import LAYOUTS, tables, written
from spolia_fidelity.environment import environment

TOTAL_S = 450.0
"""For everything, checks included. What Python takes before the clock starts, and the end of a section that is killed,
take the rest of 8 minutes."""
RATES_S = 40.0
SECTIONS_S = {
    "steps": 160.0,
    "linked": 60.0,
    "engine": 50.0,
    "sampling": 30.0,
    "attention": 60.0,
    "flashinfer": 60.0,
    "flex": 80.0,
}
"""At most, in order; where less is left of the whole, the last get less."""
GRID_FACTOR = 4
"""How much longer all of it may take with the whole grid of attention points."""
DOCS = Path("docs/gpu.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where a kernel is off, and then nothing is timed; also where a section did not come to its end."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--grid", action="store_true", help="all attention points, not the named 16")
    parser.add_argument("--only", choices=["kernels", *SECTIONS_S], help="one section")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: bench/results/gpu-DEVICE-COMMIT.json)")
    parser.add_argument("--docs", type=Path, default=DOCS, help=f"the page whose tables are written (default: {DOCS})")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing checked")
        print(json.dumps({"bench": "gpu", "device": None, "environment": environment()}))
        return 0
    began = time.monotonic()
    where, report = environment(), device_report()
    print(json.dumps({**where, **report}, indent=1), flush=True)
    result: dict[str, Any] = {"bench": "gpu", "device": where["gpu"], "environment": where, "report": report}
    run = Run(result, options.out or _path(where), began + TOTAL_S * (GRID_FACTOR if options.grid else 1))
    right = _check(run)
    if right and options.only != "kernels":
        right = _time(run, options)
    result["seconds"] = round(time.monotonic() - began, 1)
    run.save()
    print("\n".join(tables(result)))
    print(json.dumps(result))
    _write_tables(result, options.docs)
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
    if not run.section("rates", measured_rates, RATES_S):
        return False
    (run.result["rates"],) = run.result["rates"]
    factor = GRID_FACTOR if options.grid else 1
    asked = sections(run.result["rates"], grid=options.grid).items()
    ended = [run.section(name, rows, factor * SECTIONS_S[name]) for name, rows in asked if options.only in (None, name)]
    return all(ended)


def _write_tables(result: dict[str, Any], page: Path) -> None:
    """Those of sections that came to their end: what was cut short is in the result only."""
    failed = result.get("errors", {})
    whole = {name: value for name, value in result.items() if name not in LAYOUTS or name not in failed}
    if not page.is_file():
        print(f"no {page} here: tables are printed only")
        return
    page.write_text(written(page.read_text(), whole))


def _path(where: dict[str, Any]) -> Path:
    device = str(where["gpu"]).lower().replace("nvidia", "").strip().replace(" ", "-")
    return Path("bench/results") / f"gpu-{device}-{where['commit']}.json"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
