"""Writes the checkpoint of a run that may still be going on: `python -m models.demo.export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer

from .network import Shape
from .state import open_run, tokenizer_path

_FOLDER = Path(__file__).parent

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=_FOLDER, help="folder of the checkpoint")
    parser.add_argument("--state", type=Path, default=_FOLDER / ".train", help="folder of the state of the run")
    options = parser.parse_args()
    kept = tokenizer_path(options.state)
    run = open_run(options.state, Tokenizer.from_file(str(kept)), Shape(), seed=0)
    if run.progress.step == 0:
        raise SystemExit(f"there is no run in {options.state} yet: nothing was written")
    run.write_checkpoint(options.out)
    print(run.progress)
