"""Decode with shared groups equals treating every row on its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spolia_core.chunk_object import KvShape
from spolia_engine.attention import ContextAttention, DecodeAttention, VisibleRange
from spolia_engine.pool import Extent, Pool
from spolia_engine.run import SlotRange
from spolia_engine.step_plan import Tail, plan_step
from spolia_kernels import RotaryTable

HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 8, 2
SHAPE = KvShape(LAYERS, KV_HEADS, DIM, DIM, "F32")
ROTARY = RotaryTable(1.0 / 100.0 ** (torch.arange(0, DIM, 2) / DIM), head_dim=DIM, max_position=64)
SCALE = DIM**-0.5


def filled(pool: Pool, num_tokens: int, generator: torch.Generator) -> Extent:
    extent = pool.allocate(num_tokens)
    for memory in (extent.key, extent.value):
        memory.copy_(torch.randn(memory.shape, generator=generator))
    return extent


def turned(query: Tensor, by: int) -> Tensor:
    angles = by * ROTARY.inv_freq
    first, second = query.double()[..., : DIM // 2], query.double()[..., DIM // 2 :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def alone(query: Tensor, ranges: list[SlotRange], tail: tuple[Tensor, Tensor], layer: int) -> Tensor:
    """One row over its ranges and its tail, without merging partials: every score in one softmax."""
    group = HEADS // KV_HEADS
    scores, values = [], []
    for keys, vals, offset in [
        *(
            (r.extent.key[layer][:, r.start : r.end], r.extent.value[layer][:, r.start : r.end], r.offset)
            for r in ranges
        ),
        (*tail, 0),
    ]:
        wide = keys.double().repeat_interleave(group, 0)
        scores.append((wide @ turned(query, -offset)[..., None])[..., 0] * SCALE)
        values.append(vals.double().repeat_interleave(group, 0))
    weights = torch.softmax(torch.cat(scores, -1), -1)
    return (weights[..., None] * torch.cat(values, 1)).sum(1)


@st.composite
def batches(draw: st.DrawFn) -> list[list[tuple[int, int, int, int]]]:
    row = st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 8), st.integers(1, 8), st.sampled_from([0, 0, 5, 40])), max_size=4
    )
    return draw(st.lists(row, min_size=1, max_size=5))


@given(batches(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_groups_give_what_private_treatment_gives(batch: list[list[tuple[int, int, int, int]]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pool = Pool(SHAPE, num_blocks=64, block_size=16)
    shared = [filled(pool, 16, generator) for _ in range(3)]
    contexts = [[SlotRange(shared[e], start, start + n, offset) for e, start, n, offset in row] for row in batch]
    tails = [Tail(filled(pool, 6, generator), 0, length=row % 5) for row in range(len(batch))]
    poison(tails)
    attention = DecodeAttention(plan_step(contexts, tails), ROTARY)
    for layer in range(LAYERS):
        query, key, value = (torch.randn(h, len(batch), DIM, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS))
        out = attention(layer, query, key, value, SCALE)
        for row, (ranges, tail) in enumerate(zip(contexts, tails, strict=True)):
            own = tail.extent.key[layer][:, : tail.length + 1], tail.extent.value[layer][:, : tail.length + 1]
            assert torch.equal(own[0][:, -1], key[:, row])
            assert torch.equal(own[1][:, -1], value[:, row])
            torch.testing.assert_close(
                out[:, row].double(), alone(query[:, row], ranges, own, layer), atol=2e-5, rtol=0
            )


def poison(tails: list[Tail]) -> None:
    """What lies behind a tail's length must never count."""
    for tail in tails:
        tail.extent.key[:, :, tail.length :] = torch.nan
        tail.extent.value[:, :, tail.length :] = torch.nan


@pytest.mark.parametrize("first_row", [0, 1, 4])
def test_rows_before_a_ranges_first_row_do_not_see_it(first_row: int) -> None:
    generator = torch.Generator().manual_seed(3)
    pool = Pool(SHAPE, num_blocks=64, block_size=16)
    source, destination = filled(pool, 16, generator), pool.allocate(8)
    seen = SlotRange(source, 3, 11, 20)
    attention = ContextAttention(destination, 2, 5, [VisibleRange(seen, first_row)], ROTARY)
    query, key, value = (torch.randn(h, 5, DIM, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS))
    out = attention(1, query, key, value, SCALE)
    for row in range(5):
        ranges = [seen] if row >= first_row else []
        own = key[:, : row + 1], value[:, : row + 1]
        torch.testing.assert_close(out[:, row].double(), alone(query[:, row], ranges, own, 1), atol=2e-5, rtol=0)
    assert torch.equal(destination.key[1][:, 2:7], key)
    assert torch.equal(destination.value[1][:, 2:7], value)


def test_stored_kv_is_never_changed() -> None:
    generator = torch.Generator().manual_seed(4)
    pool = Pool(SHAPE, num_blocks=64, block_size=16)
    source = filled(pool, 16, generator)
    before = source.key.clone(), source.value.clone()
    tail = Tail(pool.allocate(4), 0)
    plan = plan_step([[SlotRange(source, 0, 16, 33)]], [tail])
    query, key, value = (torch.randn(h, 1, DIM, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS))
    DecodeAttention(plan, ROTARY)(0, query, key, value, SCALE)
    assert torch.equal(source.key, before[0])
    assert torch.equal(source.value, before[1])
