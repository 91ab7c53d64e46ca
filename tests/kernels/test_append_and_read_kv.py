"""The laws of writing KV into pool slots and gathering it back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_worlds import LAWFUL

from spolia_kernels import append_kv, read_kv

NUM_SLOTS = 12


def pools(dtype=torch.float32, *, as_views=False):
    """Returns a K pool and a V pool full of NaN, [2 heads, 12 slots, 4 or 3 wide]."""
    nan = float("nan")
    if as_views:
        return torch.full((15, 2, 5), nan, dtype=dtype)[1:13, :, 1:].mT.mT.transpose(0, 1), torch.full(
            (3, 14, 3), nan, dtype=dtype
        )[1:, 2:]
    return torch.full((2, NUM_SLOTS, 4), nan, dtype=dtype), torch.full((2, NUM_SLOTS, 3), nan, dtype=dtype)


def new_tokens(num_tokens: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, num_tokens, 4, generator=generator), torch.randn(2, num_tokens, 3, generator=generator)


@LAWFUL
@given(
    slots=st.lists(st.integers(0, NUM_SLOTS - 1), unique=True, max_size=NUM_SLOTS),
    skips=st.lists(st.integers(0, NUM_SLOTS), max_size=4),
    as_views=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_is_appended_is_read_back_and_nothing_else_changes(slots, skips, as_views, seed):
    mapping = list(slots)
    for at in skips:
        mapping.insert(at, -1)
    key_pool, value_pool = pools(as_views=as_views)
    key, value = new_tokens(len(mapping), seed)
    append_kv(key_pool, value_pool, torch.tensor(mapping, dtype=torch.int64), key, value)
    written = [token for token, slot in enumerate(mapping) if slot >= 0]
    read = read_kv(key_pool, value_pool, torch.tensor(slots, dtype=torch.int64))
    assert torch.equal(read.key, key[:, written])
    assert torch.equal(read.value, value[:, written])
    untouched = [slot for slot in range(NUM_SLOTS) if slot not in slots]
    assert key_pool[:, untouched].isnan().all()
    assert value_pool[:, untouched].isnan().all()


def test_a_later_append_replaces_an_earlier_one():
    key_pool, value_pool = pools()
    for seed in (1, 2):
        key, value = new_tokens(1, seed)
        append_kv(key_pool, value_pool, torch.tensor([5]), key, value)
    assert torch.equal(key_pool[:, 5:6], key)
    assert torch.equal(value_pool[:, 5:6], value)


def test_reading_copies_in_order_and_may_repeat():
    key_pool, value_pool = (pool.normal_() for pool in pools())
    read = read_kv(key_pool, value_pool, torch.tensor([3, 0, 3]))
    assert torch.equal(read.key, torch.stack([key_pool[:, 3], key_pool[:, 0], key_pool[:, 3]], 1))
    assert torch.equal(read.value, torch.stack([value_pool[:, 3], value_pool[:, 0], value_pool[:, 3]], 1))
    before = key_pool.clone()
    read.key.zero_()
    assert torch.equal(key_pool, before)


def test_a_16_bit_pool_rounds_what_it_stores():
    key_pool, value_pool = pools(torch.bfloat16)
    key, value = new_tokens(2)
    append_kv(key_pool, value_pool, torch.tensor([7, 1]), key, value)
    read = read_kv(key_pool, value_pool, torch.tensor([7, 1]))
    assert read.key.dtype == torch.bfloat16
    assert torch.equal(read.key, key.bfloat16())
    assert torch.equal(read.value, value.bfloat16())


@pytest.mark.parametrize(
    ("mapping", "error", "message"),
    [
        ([0, NUM_SLOTS], IndexError, f"slot {NUM_SLOTS} outside"),
        ([-2, 0], IndexError, "slot -2 outside"),
        ([4, 4], ValueError, "slot 4 is named twice"),
        ([0, 1, 2], ValueError, "key is"),
        ([0.0, 1.0], ValueError, "int64"),
    ],
)
def test_a_bad_slot_mapping_is_refused_and_nothing_is_written(mapping, error, message):
    key_pool, value_pool = pools()
    with pytest.raises(error, match=message):
        append_kv(key_pool, value_pool, torch.tensor(mapping), *new_tokens(2))
    assert key_pool.isnan().all()
    assert value_pool.isnan().all()


def test_skipping_every_token_twice_over_is_no_duplicate():
    key_pool, value_pool = pools()
    append_kv(key_pool, value_pool, torch.tensor([-1, -1]), *new_tokens(2))
    assert key_pool.isnan().all()


def test_tokens_and_pools_that_do_not_match_are_refused():
    key_pool, value_pool = pools()
    key, value = new_tokens(2)
    mapping = torch.tensor([0, 1])
    for wrong in (
        (key_pool[:, :6], value_pool, mapping, key, value),
        (key_pool, value_pool, mapping, key[:1], value),
        (key_pool, value_pool, mapping, key[..., :3], value),
        (key_pool, value_pool, mapping, key, value[:, :1]),
    ):
        with pytest.raises(ValueError, match=r"key is|value is|pools"):
            append_kv(*wrong)
    assert key_pool.isnan().all()
    assert value_pool.isnan().all()


@pytest.mark.parametrize("slots", [[NUM_SLOTS], [-1], [0, -3]])
def test_reading_a_slot_the_pool_does_not_have_is_refused(slots):
    with pytest.raises(IndexError, match="slots"):
        read_kv(*pools(), torch.tensor(slots))


def test_reading_through_anything_but_int64_is_refused():
    with pytest.raises(ValueError, match="int64"):
        read_kv(*pools(), torch.tensor([1], dtype=torch.int32))
