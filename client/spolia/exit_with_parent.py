"""Runs a module as `python -m` does, in a process that ends when the one that started it is gone.

The parent holds the other end of standard input and never writes: its end closes when the parent dies, however it
dies. Unlike the kernel's parent-death signal this works on every Unix, and outlives the thread that started the child.

Run by its path, `python -P …/exit_with_parent.py MODULE [ARGUMENT…]`: it imports nothing of Spolia, so the watch is on
before anything slow begins, and with `-P` the module is found as if it had been run alone.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

GRACE_S = 15.0
"""How long the orphaned process may take to end in order."""


def main() -> None:
    """Watches, and becomes the module."""
    threading.Thread(target=_end_at_eof, name="exit-with-parent", daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _end_at_eof() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    main()
