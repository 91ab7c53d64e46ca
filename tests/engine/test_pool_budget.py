"""Bytes into blocks."""

from __future__ import annotations

import pytest

from spolia_core.errors import InvalidRequest
from spolia_engine.pool_budget import RESERVED_BYTES, PoolBudget, pool_budget


@pytest.mark.parametrize(
    ("pool_bytes", "block_size", "on_device", "expected"),
    [
        (16_000, None, False, PoolBudget(20, 8)),
        (16_000, None, True, PoolBudget(10, 16)),
        (16_000, 64, True, PoolBudget(2, 64)),
        (10, None, False, PoolBudget(1, 8)),
    ],
)
def test_blocks_are_what_the_bytes_hold(
    pool_bytes: int, block_size: int | None, on_device: bool, expected: PoolBudget
) -> None:
    assert pool_budget(pool_bytes, block_size, 100, on_device=on_device) == expected


def test_a_device_keeps_something_for_its_steps() -> None:
    assert pool_budget(1000, None, 1, on_device=True, free_bytes=RESERVED_BYTES + 1000).num_blocks == 62
    with pytest.raises(InvalidRequest, match="999 are left") as error:
        pool_budget(1000, None, 1, on_device=True, free_bytes=RESERVED_BYTES + 999)
    assert error.value.field == "pool_bytes"
