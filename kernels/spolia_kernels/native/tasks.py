"""What kernels are told: tables of 64-bit numbers, by name in order. Who builds a kernel reads this, and who calls it.

Addresses are of floats, and strides count in floats, unless said otherwise.
"""

from __future__ import annotations

COMMON = (
    "next_item",  # counted up by the threads as they take work
    "next_thread",  # counted up as threads come, each to room of its own
    "num_items",
    "room",  # [threads, room_floats]
    "room_floats",
    "numbers",  # of `number_table`, and behind them sm_scale · log2 e
)

ATTEND = (
    *COMMON,
    "num_heads",  # KV heads
    "num_chunks",  # of the rows
    "chunk_rows",  # rows of a chunk, the last one's being fewer
    "num_rows",  # of one KV head
    "cut_keys",  # keys of a cut, the last one's being fewer
    "num_keys",
    "head_dim",
    "v_dim",
    "query",
    "query_head",
    "query_row",
    "key",
    "key_head",
    "key_token",
    "value",
    "value_head",
    "value_token",
    "out",  # [cuts, num_heads, num_rows, v_dim]
    "lse",  # [cuts, num_heads, num_rows], natural
)
"""`attend`: items are num_heads · num_chunks · cuts of the keys."""

STEP = (
    *COMMON,
    "room_rows",  # rows that a thread has room for
    "layer",
    "group_size",  # query heads of a KV head
    "num_rows",
    "items",  # integers [num_items, len(ITEM)]
    "ranges",  # integers [ranges, len(RANGE)]
    "slots",  # integers [num_rows, len(SLOT)]
    "query",
    "query_head",
    "query_row",
    "key",  # of the rows: written behind what their slots hold, or read where they are
    "key_head",
    "key_row",
    "value",
    "value_head",
    "value_row",
    "num_parts",  # of one KV head
    "parts",  # [KV heads, num_parts, v_dim]
    "lse",  # [KV heads, num_parts], natural
)
"""`step`: each item leaves parts, a row's of a slot or a range."""

ITEM = (
    "kind",
    "place",  # of a range, or the row whose slot it is
    "head",
    "first",  # attended rows are first, first + stride, …: `count` of the range's rows, stacked by query head
    "stride",
    "count",
    "cut",
)
BLOCK, FEW, SLOT_KIND, TRIANGLE = 0, 1, 2, 3
"""Kinds of items: rows of a range in vectors of rows, in vectors of dimensions, and a row's own slot; and `count` rows
of the step, from `place` on, over the keys of these rows, each over those at or before it.
"""

RANGE = (
    "key",  # of its first token, the first layer and head
    "key_layer",
    "key_head",
    "key_token",
    "value",
    "value_layer",
    "value_head",
    "value_token",
    "num_keys",
    "cut_keys",
    "num_rows",
    "rows",  # integers: which rows of the step
    "cos",  # of its rows' rotations
    "sin",
    "turn_row",  # from one row's to the next one's; 0 where all are alike
    "half",  # cosines of a row
    "first_part",  # of a KV head; a cut's rows, stacked by query head, are behind those of the cut before
)
SLOT = (
    "key",  # of the first token read, the first layer and head; tokens are dense
    "key_layer",
    "key_head",
    "value",
    "value_layer",
    "value_head",
    "num_keys",  # what is written now included
)

MERGE = (
    *COMMON,
    "group_size",
    "num_rows",
    "num_parts",
    "parts",
    "lse",
    "starts",  # integers [num_rows + 1]: which entries are a row's
    "entries",  # integers [entries, 2]: the part of the first query head, and how far the next one's is
    "out",  # [num_rows, query heads, v_dim]
    "out_row",
)
"""`merge`: items are num_rows · KV heads."""

ROWS = (
    *COMMON,
    "num_rows",
    "item_rows",  # rows of an item, the last one's being fewer
)
"""Every kernel that takes rows by themselves."""

RMS_NORM = (
    *ROWS,
    "width",
    "inverse_width",  # 1 / width, a float's bits
    "epsilon",  # the same
    "x",  # row r at (r div inner) · x_outer + (r mod inner) · x_inner
    "inner",
    "x_outer",
    "x_inner",
    "weight",  # [width]
    "out",  # [num_rows, width]
)

SILU_MUL = (
    *ROWS,
    "width",
    "gate",
    "up",
    "row",  # from one row's gate, or up, to the next one's
    "out",  # [num_rows, width]
)

ROTATE = (
    *ROWS,
    "num_heads",
    "head_dim",
    "x",
    "x_head",
    "x_row",
    "cos",
    "sin",
    "turn_row",  # from one row's to the next one's; 0 where all are alike
    "half",  # cosines of a row
    "out",  # [num_rows, num_heads, head_dim]
)

TILE = 128
"""Keys whose scores a thread holds at once: with 32 rows 16 KiB, half of a nearest cache. 64 and 256 are as fast."""


def block_room(num_rows: int, block_rows: int, head_dim: int, v_dim: int) -> int:
    """Floats that attending rows in blocks works in: queries, outputs, largest scores, sums, and a tile's scores."""
    rows = -(-num_rows // block_rows) * block_rows
    return rows * (head_dim + v_dim + 2) + TILE * block_rows


def few_room(num_rows: int, lanes: int, head_dim: int, v_dim: int) -> int:
    """The same of rows one by one: a largest score and a sum are a vector each."""
    return num_rows * (head_dim + v_dim + 2 * lanes) + TILE
