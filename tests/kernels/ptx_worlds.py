"""A machine for PTX: what Triton compiled for a device runs where there is none.

Warps take turns, at barriers and where they wait for copies; lanes that would branch apart are an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ptx_memory_worlds import Block, DeviceMemory
from ptx_warp_worlds import Statement, Warp

MAX_STEPS = 100_000
"""Of a warp."""


class Program:
    """A kernel's statements, which `run` goes through for one program."""

    def __init__(self, ptx: str) -> None:
        body = ptx[ptx.index("\n{") + 2 :].split(".section")[0]
        kept = (line.split("//")[0].strip() for line in body.splitlines())
        text = " ".join(line for line in kept if not line.startswith((".loc", ".reg", ".file", ".pragma")))
        text = re.sub(r"\$L__tmp\d+:|waitLoop:|@!complete bra.uni waitLoop;|\{(?=\s*[a-z@])|(?<=;)\s*}", "", text)
        self.statements: list[Statement] = []
        self.labels: dict[str, int] = {}
        for piece in re.sub(r"(\$L\w+):", r";\1:;", text).split(";"):
            if label := re.fullmatch(r"\s*(\$L\w+):", piece):
                self.labels[label[1]] = len(self.statements)
            elif found := re.fullmatch(r"\s*(?:@(!?%p\d+)\s+)?([a-z][\w.:]*)\s*(.*?)\s*", piece):
                operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found[3])
                self.statements.append(Statement(found[1] or "", tuple(found[2].split(".")), tuple(operands)))

    def run(
        self, memory: DeviceMemory, parameters: Sequence[float | int], program: tuple[int, int], num_warps: int = 1
    ) -> None:
        """One program to its end."""
        block = Block(memory, parameters, program)
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
        """Goes through a warp's statements; says when it stands at a barrier, or waits for a copy."""
        at = 0
        for _ in range(MAX_STEPS):
            statement = self.statements[at]
            at += 1
            if statement.op[0] == "ret":
                return
            where = warp.guard(statement.guard)
            if statement.op[:2] == ("bar", "sync"):
                yield "barrier"
            elif statement.op[:2] == ("mbarrier", "try_wait"):
                while not warp.has_come(statement.operands):
                    yield "copy"
            elif statement.op[0] != "bra":
                warp.do(statement, where)
            elif where.any():
                assert where.all(), "lanes branch apart"
                at = self.labels[statement.operands[0]]
        raise AssertionError("the program does not end")
