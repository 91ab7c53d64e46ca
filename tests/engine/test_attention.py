"""Decode with shared groups equals treating every row on its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spolia_core.chunk_object import KvShape
from spolia_engine import decode_attention
from spolia_engine.attention import ContextAttention, VisibleRange
from spolia_engine.decode_attention import DecodeAttention
from spolia_engine.extent import Extent
from spolia_engine.pool import Pool
from spolia_engine.run import SlotRange
from spolia_engine.sharing import always_shared, never_shared
from spolia_engine.step_plan import Tail, plan_step
from spolia_kernels import RotaryTable
from spolia_kernels.native.kernels import Kernels, kernels

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


@contextmanager
def ways(by_machine_code: bool) -> Iterator[None]:
    """With the machine code that there is here, or as where there is none."""
    if by_machine_code:
        if not isinstance(kernels(), Kernels):
            pytest.skip("no machine code is to be had here")
        with patch.object(decode_attention, "DecodeParts", None):
            yield
    else:
        with patch.object(decode_attention, "span_kernels", lambda slots, ranges: None):
            yield


@pytest.mark.parametrize("by_machine_code", [True, False])
@given(batches(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_groups_give_what_private_treatment_gives(
    by_machine_code: bool, batch: list[list[tuple[int, int, int, int]]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pool = Pool(SHAPE, num_blocks=64, block_size=16)
    shared = [filled(pool, 16, generator) for _ in range(3)]
    contexts = [[SlotRange(shared[e], start, start + n, offset) for e, start, n, offset in row] for row in batch]
    tails = [opened(pool, generator, head_tokens=row % 3, length=row % 5) for row in range(len(batch))]
    shuffled = torch.randperm(len(batch), generator=generator).tolist()
    contexts, tails = [contexts[i] for i in shuffled], [tails[i] for i in shuffled]
    sharing = always_shared if seed % 2 else never_shared
    plan = plan_step(contexts, tails, sharing)
    with ways(by_machine_code):
        attention = DecodeAttention(plan, tails, ROTARY, HEADS)
    attention.begin()
    for layer in range(LAYERS):
        query, key, value = (torch.randn(h, len(batch), DIM, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS))
        if seed % 3:  # as a layer's product leaves them, a row's heads together
            query, key, value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, key, value))
        out = attention(layer, query, key, value, SCALE)
        for row, number in enumerate(plan.order):
            ranges, tail = contexts[number], tails[number]
            end = tail.num_before + tail.length + 1
            own = tail.slot.key[layer][:, :end], tail.slot.value[layer][:, :end]
            assert torch.equal(own[0][:, -1], key[:, row])
            assert torch.equal(own[1][:, -1], value[:, row])
            assert torch.equal(tail.extent.key[layer][:, tail.length], key[:, row])
            torch.testing.assert_close(
                out[:, row].double(), alone(query[:, row], ranges, own, layer), atol=2e-5, rtol=0
            )


@pytest.mark.parametrize("by_machine_code", [True, False])
def test_a_head_that_others_read_is_read_with_them(by_machine_code: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    pool = Pool(SHAPE, num_blocks=64, block_size=16)
    owner = opened(pool, generator, head_tokens=5, length=2)
    other = opened(pool, generator, head_tokens=0, length=3)
    assert owner.head is not None
    seen = SlotRange(owner.head, 1, 5, 7)
    plan = plan_step([[], [seen]], [owner, other])
    assert [(group.rows, group.slots.start, group.slots.end) for group in plan.groups] == [((0,), 0, 1), ((0, 1), 1, 5)]
    with ways(by_machine_code):
        attention = DecodeAttention(plan, [owner, other], ROTARY, HEADS)
    attention.begin()
    query, key, value = (torch.randn(h, 2, DIM, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS))
    out = attention(0, query, key, value, SCALE)
    for row, (tail, ranges) in enumerate([(owner, []), (other, [seen])]):
        end = tail.num_before + tail.length + 1
        own = tail.slot.key[0][:, :end], tail.slot.value[0][:, :end]
        assert torch.equal(own[0][:, -1], key[:, row])
        torch.testing.assert_close(out[:, row].double(), alone(query[:, row], ranges, own, 0), atol=2e-5, rtol=0)


def opened(pool: Pool, generator: torch.Generator, *, head_tokens: int, length: int) -> Tail:
    """A tail with KV in it and before it; what lies behind its length must never count."""
    head = filled(pool, head_tokens, generator) if head_tokens else None
    tail = Tail(pool.open_tail(6, head), 0, length=length, head=head)
    for memory in (tail.extent.key, tail.extent.value):
        memory.copy_(torch.randn(memory.shape, generator=generator))
        memory[:, :, length:] = 50.0
    return tail


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
    tail = Tail(pool.open_tail(4), 0)
    plan = plan_step([[SlotRange(source, 0, 16, 33)]], [tail])
    query, key, value = (torch.randn(h, 1, DIM, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS))
    attention = DecodeAttention(plan, [tail], ROTARY, HEADS)
    attention.begin()
    attention(0, query, key, value, SCALE)
    assert torch.equal(source.key, before[0])
    assert torch.equal(source.value, before[1])
