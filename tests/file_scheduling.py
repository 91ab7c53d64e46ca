"""How a run's processes share its files: one takes all tests of a file, and all files of one cluster.

Each process that meets the session's cluster of `tests/e2e` starts one of its own: six seconds of processor time, and
most of a gigabyte as long as the run goes on.
"""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling

ONE_CLUSTER = frozenset(
    f"tests/e2e/test_{name}.py" for name in ("chat", "frees", "http", "page", "same_answer", "sdk_docs", "up")
)
"""Files whose tests use the session's cluster. One that is missing here costs a start, nothing else."""


def num_processes(num_cores: int) -> int:
    """More than cores: a third of the time a test waits, for a deadline to pass or another process to start."""
    return num_cores + (num_cores + 1) // 2


class OneClusterScheduling(LoadFileScheduling):
    """As `--dist loadfile`, but what shares a cluster is one piece."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "the session's cluster" if file in ONE_CLUSTER else file
