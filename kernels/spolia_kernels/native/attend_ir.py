"""`attend`: rows over shared keys, (KV head, chunk of rows, cut of keys) by thread."""

from __future__ import annotations

from llvmlite import ir

from spolia_kernels.native.block_rows import BlockRows, Tiling
from spolia_kernels.native.few_rows import FewRows
from spolia_kernels.native.rows import Keys, Rows
from spolia_kernels.native.task import Task
from spolia_kernels.native.tasks import ATTEND
from spolia_kernels.native.vectors import Value


def attend_blocks(tiling: Tiling) -> ir.Module:
    """Of many rows, heads of any width."""
    task = Task(tiling.lanes, ATTEND)
    fields = task.fields
    dims = fields.int("head_dim"), fields.int("v_dim")
    return _attend(task, BlockRows(task.v, tiling, task.room, fields.int("chunk_rows"), *dims))


def attend_few(lanes: int, head_dim: int, v_dim: int) -> ir.Module:
    """Of few rows, heads of these widths."""
    task = Task(lanes, ATTEND)
    return _attend(task, FewRows(task.v, task.room, task.fields.int("chunk_rows"), head_dim, v_dim))


def _attend(task: Task, attention: BlockRows | FewRows) -> ir.Module:
    fields, v = task.fields, task.v
    build = v.builder

    def work(item: Value) -> None:
        num_heads, num_chunks, num_rows = (fields.int(name) for name in ("num_heads", "num_chunks", "num_rows"))
        head, rest = build.srem(item, num_heads), build.sdiv(item, num_heads)
        chunk, cut = build.srem(rest, num_chunks), build.sdiv(rest, num_chunks)
        first_row = build.mul(chunk, fields.int("chunk_rows"))
        first_key = build.mul(cut, fields.int("cut_keys"))

        def moved(name: str, *steps: tuple[Value, str]) -> Value:
            address = fields.floats(name)
            for count, stride in steps:
                address = build.gep(address, [build.mul(count, fields.int(stride))])
            return address

        query = moved("query", (head, "query_head"), (first_row, "query_row"))
        line = build.add(build.mul(build.add(build.mul(cut, num_heads), head), num_rows), first_row)
        out = moved("out", (line, "v_dim"))
        lse = build.gep(fields.floats("lse"), [line])
        query_row, v_dim = fields.int("query_row"), fields.int("v_dim")
        rows = Rows(
            count=v.smaller_int(fields.int("chunk_rows"), build.sub(num_rows, first_row)),
            scale=task.scale,
            query=lambda row: build.gep(query, [build.mul(row, query_row)]),
            out=lambda row: build.gep(out, [build.mul(row, v_dim)]),
            lse=lambda row: build.gep(lse, [row]),
        )
        keys = Keys(
            moved("key", (head, "key_head"), (first_key, "key_token")),
            fields.int("key_token"),
            moved("value", (head, "value_head"), (first_key, "value_token")),
            fields.int("value_token"),
            v.smaller_int(fields.int("cut_keys"), build.sub(fields.int("num_keys"), first_key)),
        )
        attention.attend(rows, keys)

    return task.each_item(work)
