"""What extents leave is used again by the next of the same size, never by two, and never beyond what is free."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from spolia_core.chunk_object import KvShape
from spolia_core.errors import Busy
from spolia_engine.extent import BlockState, Extent
from spolia_engine.idle_memory import KEPT_SHARE
from spolia_engine.kept_memory import MIN_BYTES, KeptMemory
from spolia_engine.pool import Pool

LARGE = (2, MIN_BYTES // 4)
"""Of float32: twice the least that is kept."""
SHAPE, BLOCK_SIZE = KvShape(1, 1, 64, 64, "F32"), 8192
"""A block's keys, and its values, are the least that is kept."""


def test_memory_is_used_again_by_what_is_as_large() -> None:
    kept = KeptMemory()
    first = kept.take(LARGE, torch.float32)
    address = first.data_ptr()
    assert kept.num_bytes == 0, "it is lent"
    del first
    assert kept.num_bytes == 2 * MIN_BYTES
    other = kept.take((3, *LARGE), torch.float32)
    assert other.data_ptr() != address
    again = kept.take((LARGE[1], 2, 2), torch.bfloat16)
    assert (again.data_ptr(), again.dtype, tuple(again.shape)) == (address, torch.bfloat16, (LARGE[1], 2, 2))
    assert again.is_contiguous()
    assert kept.num_bytes == 0


@pytest.mark.parametrize(
    "view",
    [lambda tensor: tensor[1], lambda tensor: tensor.numpy()[1], lambda tensor: memoryview(tensor.numpy()[1])],
    ids=["tensor", "array", "bytes"],
)
def test_memory_that_somebody_looks_at_is_nobody_elses(view: Callable[[torch.Tensor], Any]) -> None:
    kept = KeptMemory()
    tensor = kept.take(LARGE, torch.float32)
    tensor.fill_(7.0)
    seen = view(tensor)
    del tensor
    other = kept.take(LARGE, torch.float32)
    other.fill_(9.0)
    assert float(seen[0]) == 7.0
    del seen
    assert kept.num_bytes == 2 * MIN_BYTES


def test_memory_that_another_thread_lets_go_of_comes_back() -> None:
    kept = KeptMemory()
    held = [kept.take(LARGE, torch.float32)]
    address = held[0].data_ptr()
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert kept.take(LARGE, torch.float32).data_ptr() == address


def test_what_is_small_is_not_kept() -> None:
    kept = KeptMemory()
    for size in ((1, MIN_BYTES // 4 - 1), (0, 3)):
        tensor = kept.take(size, torch.float32)
        assert tuple(tensor.shape) == size
        del tensor
    assert kept.num_bytes == 0


def test_the_oldest_goes_first() -> None:
    kept = KeptMemory()
    tensors = [kept.take((number, *LARGE), torch.float32) for number in (1, 2, 3)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    while tensors:
        del tensors[0]
    kept.trim(11 * MIN_BYTES)
    assert kept.num_bytes == 10 * MIN_BYTES, "in whole pieces"
    assert kept.take((3, *LARGE), torch.float32).data_ptr() == addresses[2]
    kept.trim(0)
    assert kept.num_bytes == 0


def test_a_pool_never_has_more_memory_than_its_blocks() -> None:
    """What is kept and what is taken together, whatever order extents come and go in."""
    num_blocks, rng = 32, random.Random(0)
    pool = Pool(SHAPE, num_blocks=num_blocks, block_size=BLOCK_SIZE)
    block_bytes = BLOCK_SIZE * SHAPE.bytes_per_token
    held: list[Extent] = []
    num_reused, seen = 0, set[int]()
    for _ in range(600):
        if held and rng.random() < 0.5:
            pool.release(held.pop(rng.randrange(len(held))))
        else:
            try:
                extent = pool.allocate(rng.randint(1, 4) * BLOCK_SIZE)
            except Busy:
                continue
            held.append(extent)
            num_reused += extent.key.data_ptr() in seen
            seen.add(extent.key.data_ptr())
        num_free = pool.counts()[BlockState.FREE]
        assert pool.kept_bytes <= min(num_free, num_blocks * KEPT_SHARE) * block_bytes
        pool.check_invariants()
    assert num_reused > 100
    for extent in held:
        pool.release(extent)
    assert 0 < pool.kept_bytes <= num_blocks * KEPT_SHARE * block_bytes


def test_a_pool_of_a_device_keeps_nothing_of_its_own() -> None:
    pool = Pool(SHAPE, num_blocks=4, block_size=BLOCK_SIZE, device="meta")
    pool.release(pool.allocate(BLOCK_SIZE))
    assert pool.kept_bytes == 0
