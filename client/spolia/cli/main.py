"""Entry point of the `spolia` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

EXTRA = frozenset({"rich", "typer"})


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and ends the process with its exit code. `argv` is without the program's name."""
    try:
        from spolia.cli.app import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA:
            raise
        sys.exit(f"the spolia command needs {missing}; install the extra `cli`: pip install 'spolia[cli]'")
    sys.exit(run(argv))


if __name__ == "__main__":
    main()
