"""A layer that comes in pieces is the layer that comes whole, wherever its memory lies."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from spolia_core.chunk_object import KvShape
from spolia_core.digests import digest
from spolia_engine.extent import Extent
from spolia_engine.kv_bytes import layer_of_run
from spolia_engine.layer_filling import LayerFilling
from spolia_engine.pool import Pool
from spolia_engine.run import Run
from spolia_engine.slot_memory import SlotMemory

NUM_TOKENS, PAGE = 40, 16
WIDE = KvShape(num_layers=2, num_kv_heads=3, head_dim=4, v_dim=6, dtype="BF16")
EVEN = KvShape(num_layers=2, num_kv_heads=3, head_dim=4, v_dim=4, dtype="BF16")


def in_one_piece(num_tokens: int) -> tuple[KvShape, Extent]:
    return WIDE, Pool(WIDE, num_blocks=8).allocate(num_tokens, in_transfer=True)


def in_pieces(num_tokens: int) -> tuple[KvShape, Extent]:
    """In the memory of a device, of which every second page is taken."""
    memory = SlotMemory(EVEN, num_pages=8, page_size=PAGE, dtype=torch.bfloat16, device="cpu")
    pool = Pool(EVEN, num_blocks=8, block_size=PAGE, slots=memory)
    pages = [pool.allocate(PAGE) for _ in range(8)]
    for page in pages[::2]:
        pool.release(page)
    extent = pool.allocate(num_tokens, in_transfer=True)
    assert len(extent.pieces) == 3
    return EVEN, extent


@pytest.mark.parametrize("allocate", [in_one_piece, in_pieces])
@pytest.mark.parametrize("num_spare", [0, 4])
@pytest.mark.parametrize("at_once", [1, 7, 900, 1 << 20])
def test_what_was_taken_is_what_is_read(
    allocate: Callable[[int], tuple[KvShape, Extent]], num_spare: int, at_once: int
) -> None:
    """Also into the beginning of an extent that has more room; what belongs to the next layer is left."""
    shape, extent = allocate(NUM_TOKENS + num_spare)
    num_bytes = shape.layer_bytes(NUM_TOKENS)
    for piece in extent.pieces:
        piece.key.fill_(-1.0)
        piece.value.fill_(-1.0)
    untouched = layer_of_run(Run(extent, 0, NUM_TOKENS, 0), 0)
    spare = layer_of_run(Run(extent, NUM_TOKENS, num_spare, 0), 1) if num_spare else None
    data = random.Random(at_once).randbytes(num_bytes)
    filling = LayerFilling(extent, 1, NUM_TOKENS)
    for start in range(0, num_bytes, at_once):
        assert not filling.is_full
        given = (data + b"next layer")[start : start + at_once]
        assert filling.take(memoryview(given)) == min(len(given), num_bytes - start)
    assert filling.is_full
    assert filling.digest == digest(data)
    filling.finish()
    assert b"".join(layer_of_run(Run(extent, 0, NUM_TOKENS, 0), 1)) == data
    assert layer_of_run(Run(extent, 0, NUM_TOKENS, 0), 0) == untouched
    if spare is not None:
        assert layer_of_run(Run(extent, NUM_TOKENS, num_spare, 0), 1) == spare


def test_in_one_piece_there_is_no_other_memory_than_the_extents() -> None:
    shape, extent = in_one_piece(NUM_TOKENS)
    data = random.Random(0).randbytes(shape.layer_bytes(NUM_TOKENS))
    LayerFilling(extent, 1, NUM_TOKENS).take(memoryview(data))
    assert b"".join(layer_of_run(Run(extent, 0, NUM_TOKENS, 0), 1)) == data, "before it is finished"


def test_a_layer_that_is_not_whole_does_not_finish() -> None:
    shape, extent = in_one_piece(NUM_TOKENS)
    filling = LayerFilling(extent, 0, NUM_TOKENS)
    filling.take(memoryview(bytes(shape.layer_bytes(NUM_TOKENS) - 1)))
    assert not filling.is_full
    with pytest.raises(AssertionError):
        filling.finish()
