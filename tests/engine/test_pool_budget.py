"""Bytes into blocks."""

from __future__ import annotations

import pytest
from engine_worlds import adapter_of, letters

from spolia_core.errors import InvalidRequest
from spolia_engine.device_decoding import DeviceSettings
from spolia_engine.engine import Engine
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
    with pytest.raises(InvalidRequest, match="990 are left"):
        pool_budget(1000, None, 1, on_device=True, free_bytes=RESERVED_BYTES + 1000, step_bytes=10)


def test_the_buffers_of_steps_take_what_is_kept_for_them() -> None:
    """Of Llama-3-8B's shape 0.47 GB by arithmetic; of a tiny model all that its steps hold, but for what is small."""
    shape = {"num_q_heads": 32, "head_dim": 128, "vocab_size": 128_256, "itemsize": 2}
    assert round(DeviceSettings().buffer_bytes(**shape) / 1e9, 2) == 0.47
    settings = DeviceSettings(row_buckets=(1, 4), min_parts=64)
    engine = Engine(adapter_of("llama"), letters, num_blocks=8, block_size=16, device=settings)
    assert engine.decoding.device is not None
    engine.decoding.device.prepare()
    held = [t for step in engine.decoding.device._steps.values() for t in (step._partials.out, step._partials.lse)]
    logits = [
        step.logits(lambda layer, qkv: qkv[:, :6].contiguous()) for step in engine.decoding.device._steps.values()
    ]
    expected = settings.buffer_bytes(num_q_heads=6, head_dim=16, vocab_size=97, itemsize=4)
    assert sum(t.nbytes for t in (*held, *logits)) == expected
