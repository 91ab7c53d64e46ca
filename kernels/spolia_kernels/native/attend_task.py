"""What the attention kernel is told: a table of 64-bit numbers, by name in order."""

from __future__ import annotations

FIELDS = (
    "next_item",  # counted up by the threads as they take work
    "next_thread",  # counted up as threads come, each to room of its own
    "num_items",  # num_heads · num_chunks · cuts of the keys
    "num_heads",  # KV heads
    "num_chunks",  # of the rows
    "chunk_rows",  # rows of a chunk, the last one's being fewer
    "num_rows",  # of one KV head
    "cut_keys",  # keys of a cut, the last one's being fewer
    "num_keys",
    "head_dim",
    "v_dim",
    "query",  # address; strides count in floats
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
    "room",  # [threads, room_floats]
    "room_floats",
    "numbers",  # of `number_table`, and behind them sm_scale · log2 e
)
NUM_FIELDS = len(FIELDS)
TILE = 128
"""Keys whose scores a thread holds at once: with 32 rows 16 KiB, half of a nearest cache. 64 and 256 are as fast."""


def room_floats(chunk_rows: int, block_rows: int, head_dim: int, v_dim: int) -> int:
    """Floats a thread works in: queries, outputs, largest scores and sums of a chunk, and a tile's scores."""
    rows = -(-chunk_rows // block_rows) * block_rows
    return rows * (head_dim + v_dim + 2) + TILE * block_rows
