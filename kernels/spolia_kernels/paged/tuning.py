"""How the paged kernels are cut, by what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tuning:
    """Keys of one step, warps of a program, depth of the pipeline, programs per multiprocessor where they stay."""

    keys: int
    num_warps: int
    num_stages: int
    per_processor: int = 1
    max_registers: int | None = None
    """Of a thread, over tails; None: as many as the compiler takes. Fewer let more programs wait side by side."""


def span_tuning(query: Tensor, tile: int) -> Tuning:
    """For a tile of query rows over spans. Wide numbers and heads fill shared memory with fewer keys.

    H200, bfloat16, head_dim 128, 1,024 rows over 16,384 keys, 32 heads, TFLOP/s: a tile of 64 with 64 keys, 4 warps
    and 3 stages, twice on a multiprocessor, 522; with 2 stages 400; a tile of 128 with 128 keys, 8 warps and 3 stages
    468. Keys loaded by pointers in the place of tensor copies: 345 at best.
    """
    if query.dtype.itemsize == 4 or query.shape[-1] > 128:
        return Tuning(32, 4, 2)
    return Tuning(64, 4, 3, 2) if tile > 16 else Tuning(32, 2, 3, 4)


def tail_tuning(query: Tensor) -> Tuning:
    """For the rows' own tails: one warp, of which many wait side by side.

    H200, bfloat16, 32 heads, 1,024 rows with 129 and with 1 key, ms: 16 keys a step, 1 warp 0.52 and 0.10; 32 keys, 2
    warps 0.56 and 0.17; 64 keys, 4 warps 0.57 and 0.19. That was in tiles of 16 rows, which rows without GQA had too.
    """
    return Tuning(16, 1, 2)


def tile_rows(num_rows: int, group_size: int) -> int:
    """Query rows of a tile over spans that so many rows read at most, a GQA group of each side by side."""
    return max(16, min(64, 1 << (num_rows * group_size - 1).bit_length()), 1 << (group_size - 1).bit_length())


def piece_keys(num_tiles: int, longest: int, num_programs: int) -> int:
    """Keys of one piece, for `num_tiles` tiles over spans of up to `longest` keys on as many programs as run at once.

    Programs walk the items round by round; a piece more fills the last round better and costs its start and its
    partials, as much as some keys.
    """
    most = max(1, longest // MIN_PIECE)

    def cost(num_pieces: int) -> float:
        rounds = -(-num_tiles * num_pieces // num_programs)
        return rounds * (longest / num_pieces + ITEM_KEYS)

    return -(-longest // min(range(1, min(most, 64) + 1), key=cost))


MIN_PIECE = 128
ITEM_KEYS = 96
"""What starting an item and writing its partials costs, in keys."""
