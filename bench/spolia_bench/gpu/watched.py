"""A section in a process of its own: one that fails, hangs or breaks the device leaves the others their results."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from spolia_bench.gpu.crew import END_S, end, in_a_group_of_its_own

Row = dict[str, Any]


def watched(rows: Callable[[], Iterator[Row]], seconds: float, on_row: Callable[[Row], None]) -> str | None:
    """Runs `rows`, which a new process can import, and calls `on_row` with each row as it comes.

    Returns what went wrong, None where nothing did. After `seconds` the process is killed, and what it started.
    """
    deadline = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_rows, args=(rows, sender))
    process.start()
    sender.close()  # the process has one of its own: when it ends, the pipe does
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            kind, value = receiver.recv()
            if kind != "row":
                return None if kind == "end" else str(value)
            on_row(value)
        return f"not ended after {seconds:.0f} s"
    except EOFError:
        process.join(END_S)
        return f"its process ended by itself, status {process.exitcode}"
    finally:
        end(process)
        receiver.close()


def _send_rows(rows: Callable[[], Iterator[Row]], sender: Connection) -> None:
    in_a_group_of_its_own()
    try:
        for row in rows():
            sender.send(("row", row))
    except Exception as failure:
        traceback.print_exc()
        sender.send(("error", f"{type(failure).__name__}: {failure}".splitlines()[0][:200]))
    else:
        sender.send(("end", None))
