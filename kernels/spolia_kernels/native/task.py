"""The frame of a kernel: what it was told, and items taken from a counter until none is left.

A thread that was interrupted leaves the rest to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from spolia_kernels.native.number_table import NUMBERS
from spolia_kernels.native.vectors import F32, FLOATS, I32, I64, INTS, Value, Vectors


class Table:
    """A row of named 64-bit numbers in memory."""

    def __init__(self, builder: ir.IRBuilder, address: Value, names: Sequence[str]) -> None:
        self._builder = builder
        self._address = address
        self._names = names

    def int(self, name: str) -> Value:
        """One of them."""
        return self._builder.load(self._place(name))

    def floats(self, name: str) -> Value:
        """One that is the address of floats."""
        return self._builder.inttoptr(self.int(name), FLOATS)

    def ints(self, name: str) -> Value:
        """One that is the address of integers."""
        return self._builder.inttoptr(self.int(name), INTS)

    def float(self, name: str) -> Value:
        """One that is a float's bits."""
        build = self._builder
        return build.bitcast(build.trunc(self.int(name), I32), F32)

    def counted(self, name: str) -> Value:
        """One that every thread counts up by one, as it was before."""
        return self._builder.atomic_rmw("add", self._place(name), I64(1), "monotonic")

    def row(self, name: str, index: Value, names: Sequence[str]) -> Table:
        """A row of the table that one is the address of."""
        build = self._builder
        return Table(build, build.gep(self.ints(name), [build.mul(index, I64(len(names)))]), names)

    def _place(self, name: str) -> Value:
        return self._builder.gep(self._address, [I64(self._names.index(name))])


class Task:
    """A module of one function, `task(fields)`, that each thread runs."""

    def __init__(self, lanes: int, names: Sequence[str]) -> None:
        self.module = ir.Module("kernel")
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [INTS]), "task")
        self._builder = ir.IRBuilder(function.append_basic_block())
        self.fields = Table(self._builder, function.args[0], names)
        self.v = self.vectors_of(lanes)
        self.scale = self.v.load(self.fields.floats("numbers"), I64(len(NUMBERS)))
        place = self._builder.mul(self.fields.counted("next_thread"), self.fields.int("room_floats"))
        self.room = self._builder.gep(self.fields.floats("room"), [place])

    def vectors_of(self, lanes: int) -> Vectors:
        """Vectors of so many floats, before `each_item`."""
        return Vectors(self.module, self._builder, self.fields.floats("numbers"), lanes)

    def each_row(self, work: Callable[[Value], None]) -> ir.Module:
        """Ends the function, told what `ROWS` names: `work(row)` for every row of every item. Returns the module."""
        build, num_rows = self.v.builder, self.fields.int("num_rows")
        item_rows = self.fields.int("item_rows")

        def row(index: Value, _: list[Value]) -> Sequence[Value]:
            work(index)
            return []

        def rows(item: Value) -> None:
            first = build.mul(item, item_rows)
            self.v.loop(first, self.v.smaller_int(build.add(first, item_rows), num_rows), 1, [], row)

        return self.each_item(rows)

    def each_item(self, work: Callable[[Value], None]) -> ir.Module:
        """Ends the function: `work(item)` until there is none. Returns the module."""
        build = self.v.builder
        num_items = self.fields.int("num_items")
        again, found, done = (build.append_basic_block() for _ in range(3))
        build.branch(again)
        build.position_at_end(again)
        item = self.fields.counted("next_item")
        build.cbranch(build.icmp_signed("<", item, num_items), found, done)
        build.position_at_end(found)
        work(item)
        build.branch(again)
        build.position_at_end(done)
        build.ret_void()
        return self.module
