"""A machine for PTX: what Triton compiled for a device runs where there is none.

Warps take turns, at barriers and where they wait for copies. Lanes of a warp that branch apart meet again before
anything that they do together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from ptx_memory_worlds import Block, DeviceMemory
from ptx_warp_worlds import MATRIX, Statement, Warp

MAX_STEPS = 400_000
"""Of a warp."""
NOBODY = np.zeros(32, bool)
TOGETHER = frozenset({"bar", "shfl", "redux", "elect", "ret", *MATRIX})
"""What all lanes of a warp take part in."""


class Program:
    """A kernel's statements, which `run` goes through for one program."""

    def __init__(self, ptx: str) -> None:
        body = ptx[ptx.index("\n{") + 2 :].split(".section")[0]
        kept = (line.split("//")[0].strip() for line in body.splitlines())
        text = " ".join(line for line in kept if not line.startswith((".loc", ".reg", ".file", ".pragma")))
        text = re.sub(
            r"\$L__tmp\d+:|waitLoop:|@!complete bra.uni waitLoop;|\{(?!\s*tmp)(?=\s*[a-z@])|(?<=;)\s*}", "", text
        )
        self.statements: list[Statement] = []
        self.labels: dict[str, int] = {}
        for piece in re.sub(r"(\$L\w+):", r";\1:;", text).split(";"):
            if label := re.fullmatch(r"\s*(\$L\w+):", piece):
                self.labels[label[1]] = len(self.statements)
            elif found := re.fullmatch(r"\s*(?:@(!?%p\d+)\s+)?([a-z][\w.:]*)\s*(.*?)\s*", piece):
                operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found[3])
                self.statements.append(Statement(found[1] or "", tuple(found[2].split(".")), tuple(operands)))

    def run(
        self,
        memory: DeviceMemory,
        parameters: Sequence[float | int],
        program: tuple[int, int],
        num_warps: int = 1,
        num_programs: tuple[int, int] = (1, 1),
    ) -> None:
        """One program to its end."""
        with np.errstate(all="ignore"):  # a device knows infinities and what is no number, and says nothing of them
            self._run(Block(memory, parameters, program, num_programs), num_warps)

    def _run(self, block: Block, num_warps: int) -> None:
        running = {index: self._steps(Warp(block, index)) for index in range(num_warps)}
        met: set[int] = set()
        idle = 0
        while running:
            idle += 1
            assert idle < 4, "every warp waits"
            for index in running.keys() - met:
                pause = next(running[index], "end")
                if pause == "end":
                    del running[index]
                elif pause == "barrier":
                    met.add(index)
                idle = idle if pause == "copy" else 0
            if running and met == running.keys():
                met.clear()

    def _steps(self, warp: Warp) -> Iterator[str]:
        """Goes through a warp's statements; says when it stands at a barrier, or waits for a copy.

        Lanes that branch apart wait for each other: those that are furthest behind go first.
        """
        at, lanes = 0, np.ones(32, bool)
        ahead: dict[int, NDArray[np.bool_]] = {}
        for _ in range(MAX_STEPS):
            if ahead and min(ahead) <= at:
                ahead[at] = ahead.get(at, NOBODY) | lanes
                at = min(ahead)
                lanes = ahead.pop(at)
            statement = self.statements[at]
            at += 1
            assert lanes.all() or statement.op[0] not in TOGETHER, f"{statement.op}: lanes are apart"
            if statement.op[0] == "ret":
                return
            where = warp.guard(statement.guard) & lanes
            if statement.op[:2] == ("bar", "sync"):
                yield "barrier"
            elif statement.op[:2] == ("mbarrier", "try_wait"):
                while not warp.has_come(statement.operands):
                    yield "copy"
            elif statement.op[0] != "bra":
                warp.do(statement, where)
            elif where.any():
                to = self.labels[statement.operands[0]]
                if (lanes == where).all():
                    at = to
                else:
                    ahead[to] = ahead.get(to, NOBODY) | where
                    lanes = lanes & ~where
        raise AssertionError("the program does not end")
