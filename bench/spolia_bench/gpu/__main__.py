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

from spolia_bench.gpu.kernels import errors
from spolia_fidelity.environment import environment


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where a kernel is off; nothing is timed then."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--grid", action="store_true", help="all attention points, not the named 16")
    parser.add_argument("--only", choices=["kernels", "attention", "steps", "linked"], help="one section")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: bench/results/gpu-DEVICE-COMMIT.json)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing checked")
        print(json.dumps({"bench": "gpu", "device": None, "environment": environment()}))
        return 0
    began = time.monotonic()
    where = environment()
    result: dict[str, Any] = {"bench": "gpu", "device": where["gpu"], "environment": where}
    path = options.out or _path(where)
    found = errors()
    result["kernels"] = [{"what": what, "error": error, "limit": limit} for what, error, limit in found]
    for what, error, limit in found:
        print(f"{what:55} {error:.2e} (at most {limit:.0e}){'' if error <= limit else '  OFF'}", flush=True)
    right = all(error <= limit for _, error, limit in found)
    if right and options.only != "kernels":
        _time(result, options, path)
    result["seconds"] = round(time.monotonic() - began, 1)
    _save(result, path)
    print(json.dumps(result))
    return 0 if right else 1


def _time(result: dict[str, Any], options: argparse.Namespace, path: Path) -> None:
    """Fills in what was asked for, saving after each row: a run that is cut short leaves what it has."""
    from spolia_bench.gpu import attention, linked, steps
    from spolia_bench.gpu.rates import measure

    rates = measure()
    result["rates"] = {"copy_tb_per_s": rates.copy / 1e12, "matrix_tflop_per_s": rates.matrix / 1e12}
    print(f"copy {rates.copy / 1e12:.2f} TB/s, bfloat16 products {rates.matrix / 1e12:.0f} TFLOP/s", flush=True)
    if options.only in (None, "steps"):
        rows = result["steps"] = []
        for shape in steps.SHAPES:
            for row in steps.compare(shape, rates, steps.POINTS):
                _say(rows, row, result, path)
            torch.cuda.empty_cache()
    if options.only in (None, "linked"):
        rows = result["linked"] = []
        for row in linked.compare(steps.SHAPES[0], rates):
            _say(rows, row, result, path)
        torch.cuda.empty_cache()
    if options.only in (None, "attention"):
        rows = result["attention"] = []
        for row in attention.compare(rates, attention.GRID if options.grid else attention.NAMED):
            _say(rows, row, result, path)


def _say(rows: list[dict[str, Any]], row: dict[str, Any], result: dict[str, Any], path: Path) -> None:
    rows.append(row)
    print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    _save(result, path)


def _save(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def _path(where: dict[str, Any]) -> Path:
    device = str(where["gpu"]).lower().replace("nvidia", "").strip().replace(" ", "-")
    return Path("bench/results") / f"gpu-{device}-{where['commit']}.json"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
