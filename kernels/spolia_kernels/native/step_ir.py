"""`step`: a layer's attention of a step or a pass, and `merge`, what each row has of it put together.

An item is a row and a KV head over its own slot, behind whose keys the row's new one is written first; some rows of a
range, whose queries are turned to where the range stands for them as they are read; or some neighbouring rows over
themselves, each over those at or before it. Each leaves its part, output and
log of the sum, at a place that the plan gave it; when all are there, `merge` joins every row's.

    m = max_i lse_i;   w_i = e^(lse_i - m);   out = sum_i w_i out_i / sum_i w_i

Source: Hydragen (arXiv 2402.05099) §3.1-3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from spolia_kernels.native.block_rows import BlockRows, Tiling
from spolia_kernels.native.few_rows import FewRows
from spolia_kernels.native.number_table import LOG2_E, LOWEST
from spolia_kernels.native.rows import Keys, Rows, Turn
from spolia_kernels.native.task import Table, Task
from spolia_kernels.native.tasks import BLOCK, ITEM, MERGE, RANGE, SLOT, SLOT_KIND, STEP, TRIANGLE
from spolia_kernels.native.vectors import I64, Value


def step_module(lanes: int, tiling: Tiling, head_dim: int, v_dim: int) -> ir.Module:
    """Parts of every row. `lanes` divide the widths; `tiling` may have wider vectors."""
    return _Step(lanes, tiling, head_dim, v_dim).built()


class _Step:
    def __init__(self, lanes: int, tiling: Tiling, head_dim: int, v_dim: int) -> None:
        self.task = Task(lanes, STEP)
        self.fields, self.v = self.task.fields, self.task.v
        self.head_dim, self.v_dim = head_dim, v_dim
        most_rows = self.fields.int("room_rows")
        self.few = FewRows(self.v, self.task.room, most_rows, head_dim, v_dim)
        # Lines of both lie in the same room: an item is of one kind.
        wide = self.task.vectors_of(tiling.lanes)
        self.block = BlockRows(wide, tiling, self.task.room, most_rows, I64(head_dim), I64(v_dim))

    def built(self) -> ir.Module:
        return self.task.each_item(self.item)

    def item(self, index: Value) -> None:
        build = self.v.builder
        item = self.fields.row("items", index, ITEM)
        kind, head = item.int("kind"), item.int("head")
        with build.if_else(build.icmp_signed("==", kind, I64(SLOT_KIND))) as (of_slot, of_range):
            with of_slot:
                self.slot_item(item, head)
            with of_range, build.if_else(build.icmp_signed("==", kind, I64(TRIANGLE))) as (of_own, of_shared):
                with of_own:
                    self.triangle_item(item, head)
                with of_shared:
                    self.range_item(item, head, build.icmp_signed("==", kind, I64(BLOCK)))

    def slot_item(self, item: Table, head: Value) -> None:
        """A row's group of query heads over what stands in its slot and what is written behind it now."""
        build, row = self.v.builder, item.int("place")
        slot = self.fields.row("slots", row, SLOT)
        layer = self.fields.int("layer")
        key = self.moved(slot, "key", (layer, slot.int("key_layer")), (head, slot.int("key_head")))
        value = self.moved(slot, "value", (layer, slot.int("value_layer")), (head, slot.int("value_head")))
        num_keys = slot.int("num_keys")
        last = build.sub(num_keys, I64(1))
        keys = Keys(key, I64(self.head_dim), value, I64(self.v_dim), num_keys)
        for name, target, width in (
            ("key", keys.key_at(self.v, last), self.head_dim),
            ("value", keys.value_at(self.v, last), self.v_dim),
        ):
            source = self.moved(
                self.fields, name, (head, self.fields.int(f"{name}_head")), (row, self.fields.int(f"{name}_row"))
            )
            for first in range(0, width, self.v.lanes):
                self.v.store_vector(self.v.load_vector(source, I64(first)), target, I64(first))
        self.few.attend(self.group_of(head, row), keys)

    def triangle_item(self, item: Table, head: Value) -> None:
        """Neighbouring rows, one after the other, over the first of them up to itself."""
        build, first = self.v.builder, item.int("place")
        key, value = (
            self.moved(
                self.fields, name, (head, self.fields.int(f"{name}_head")), (first, self.fields.int(f"{name}_row"))
            )
            for name in ("key", "value")
        )
        key_row, value_row = self.fields.int("key_row"), self.fields.int("value_row")

        def row(index: Value, _: list[Value]) -> Sequence[Value]:
            keys = Keys(key, key_row, value, value_row, build.add(index, I64(1)))
            self.few.attend(self.group_of(head, build.add(first, index)), keys)
            return []

        self.v.loop(I64(0), item.int("count"), 1, [], row)

    def group_of(self, head: Value, row: Value) -> Rows:
        """A row's query heads of a KV head, whose part is the row's own."""
        build, num_rows = self.v.builder, self.fields.int("num_rows")

        def part(g: Value) -> Value:
            return self.part(head, build.add(build.mul(g, num_rows), row))

        return Rows(
            count=self.fields.int("group_size"),
            scale=self.task.scale,
            query=lambda g: self.query(head, g, row),
            out=lambda g: self.out(part(g)),
            lse=lambda g: self.lse(part(g)),
        )

    def range_item(self, item: Table, head: Value, is_block: Value) -> None:
        build = self.v.builder
        of = self.fields.row("ranges", item.int("place"), RANGE)
        layer, num_rows = self.fields.int("layer"), of.int("num_rows")
        cut, cut_keys = item.int("cut"), of.int("cut_keys")
        first_key = build.mul(cut, cut_keys)
        key_token, value_token = of.int("key_token"), of.int("value_token")
        keys = Keys(
            self.moved(of, "key", (layer, of.int("key_layer")), (head, of.int("key_head")), (first_key, key_token)),
            key_token,
            self.moved(
                of, "value", (layer, of.int("value_layer")), (head, of.int("value_head")), (first_key, value_token)
            ),
            value_token,
            self.v.smaller_int(cut_keys, build.sub(of.int("num_keys"), first_key)),
        )
        first, stride = item.int("first"), item.int("stride")
        cos, sin, turn_row, half = of.floats("cos"), of.floats("sin"), of.int("turn_row"), of.int("half")
        numbers = of.ints("rows")
        of_cut = build.mul(cut, build.mul(num_rows, self.fields.int("group_size")))
        first_part = build.add(of.int("first_part"), of_cut)

        def stacked(r: Value) -> Value:
            return build.add(first, build.mul(r, stride))

        def query(r: Value) -> Value:
            line = stacked(r)
            row = build.load(build.gep(numbers, [build.srem(line, num_rows)]))
            return self.query(head, build.sdiv(line, num_rows), row)

        def turn(r: Value) -> Turn:
            place = build.mul(build.srem(stacked(r), num_rows), turn_row)
            return Turn(build.gep(cos, [place]), build.gep(sin, [place]), half)

        rows = Rows(
            count=item.int("count"),
            scale=self.task.scale,
            query=query,
            out=lambda r: self.out(self.part(head, build.add(first_part, stacked(r)))),
            lse=lambda r: self.lse(self.part(head, build.add(first_part, stacked(r)))),
            turn=turn,
        )
        with build.if_else(is_block) as (in_blocks, one_by_one):
            with in_blocks:
                self.block.attend(rows, keys)
            with one_by_one:
                self.few.attend(rows, keys)

    def moved(self, table: Table, name: str, *steps: tuple[Value, Value]) -> Value:
        build, address = self.v.builder, table.floats(name)
        for count, stride in steps:
            address = build.gep(address, [build.mul(count, stride)])
        return address

    def query(self, head: Value, g: Value, row: Value) -> Value:
        build, fields = self.v.builder, self.fields
        q_head = build.add(build.mul(head, fields.int("group_size")), g)
        return self.moved(fields, "query", (q_head, fields.int("query_head")), (row, fields.int("query_row")))

    def part(self, head: Value, index: Value) -> Value:
        build = self.v.builder
        return build.add(build.mul(head, self.fields.int("num_parts")), index)

    def out(self, part: Value) -> Value:
        return self.moved(self.fields, "parts", (part, I64(self.v_dim)))

    def lse(self, part: Value) -> Value:
        return self.moved(self.fields, "lse", (part, I64(1)))


def merge_module(lanes: int, v_dim: int) -> ir.Module:
    """Rows' parts joined, `v_dim` being a multiple of `lanes`."""
    task = Task(lanes, MERGE)
    fields, v = task.fields, task.v
    build = v.builder

    def work(item: Value) -> None:
        num_rows, group = fields.int("num_rows"), fields.int("group_size")
        row, head = build.srem(item, num_rows), build.sdiv(item, num_rows)
        starts = fields.ints("starts")
        start, end = (build.load(build.gep(starts, [build.add(row, I64(n))])) for n in (0, 1))
        v.loop(I64(0), group, 1, [], lambda g, _: row_of(row, head, g, start, end))

    def row_of(row: Value, head: Value, g: Value, start: Value, end: Value) -> Sequence[Value]:
        first = build.mul(head, fields.int("num_parts"))

        def part(entry: Value) -> Value:
            place = build.gep(fields.ints("entries"), [build.mul(entry, I64(2))])
            step = build.load(build.gep(place, [I64(1)]))
            return build.add(first, build.add(build.load(place), build.mul(g, step)))

        def log(entry: Value) -> Value:
            return build.fmul(v.splat(v.load(fields.floats("lse"), part(entry))), v.number(LOG2_E))

        tops = v.loop(start, end, 1, [v.number(LOWEST)], lambda e, top: [v.larger(log(e), top[0])])
        num_vectors = v_dim // lanes

        def add(entry: Value, carried: list[Value]) -> Sequence[Value]:
            weight = v.exp2(build.fsub(log(entry), tops[0]))
            line = build.gep(fields.floats("parts"), [build.mul(part(entry), I64(v_dim))])
            parts = [v.load_vector(line, I64(n * lanes)) for n in range(num_vectors)]
            outs = [v.fma(weight, x, out) for x, out in zip(parts, carried[1:], strict=True)]
            return [build.fadd(carried[0], weight), *outs]

        total, *outs = v.loop(start, end, 1, [v.zero] * (1 + num_vectors), add)
        whole = build.fdiv(v.number(1.0), total)
        q_head = build.add(build.mul(head, fields.int("group_size")), g)
        place = build.add(build.mul(row, fields.int("out_row")), build.mul(q_head, I64(v_dim)))
        for n, out in enumerate(outs):
            v.store_vector(build.fmul(out, whole), fields.floats("out"), build.add(place, I64(n * lanes)))
        return []

    return task.each_item(work)
