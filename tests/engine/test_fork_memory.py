"""What forks hold: their tails and nothing else; and nothing where they are refused or break."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_worlds import (
    MAX_CONTEXT,
    assert_nothing_held,
    engine_of,
    tokens,
)
from fork_worlds import LENS, close_all, exact, linked, tails_of
from torch import Tensor

from spolia_core.errors import Busy, InvalidRequest
from spolia_engine.extent import BlockState
from spolia_engine.fork_attention import ForkAttention

pytestmark = pytest.mark.usefixtures("place")


def test_forks_take_memory_for_their_tails_only() -> None:
    engine = engine_of()
    _, _, context = linked(engine)
    before = engine.pool.counts()[BlockState.REFERENCED]
    tails = tails_of()
    forks = engine.fork(context, tails)
    own = [engine.pool.blocks_for(len(tail)) for tail in tails]
    assert engine.pool.counts()[BlockState.REFERENCED] == before + sum(own)
    for fork, blocks in zip(forks.contexts, own, strict=True):  # each gives back its own, alone
        held = engine.pool.counts()[BlockState.REFERENCED]
        fork.close()
        engine.pool.check_invariants()
        assert engine.pool.counts()[BlockState.REFERENCED] == held - blocks
    close_all(engine, context, forks)


def test_a_forked_context_stays_open_and_unchanged() -> None:
    engine = engine_of()
    _, _, context = linked(engine)
    before = [(e.ref_count, e.key.clone(), e.value.clone()) for e in context.extents]
    spans, last = list(context.spans), context.last_hidden
    forks = engine.fork(context, tails_of())
    first = [hidden.clone() for hidden in forks.hidden]
    assert context.spans == spans
    assert context.last_hidden is last
    assert not context.closed
    forks.close()
    for extent, (references, key, value) in zip(context.extents, before, strict=True):
        assert extent.ref_count == references
        assert torch.equal(extent.key, key)
        assert torch.equal(extent.value, value)
    again = engine.fork(context, tails_of())
    assert all(torch.equal(mine, its) for mine, its in zip(again.hidden, first, strict=True))
    close_all(engine, context, again)


# Refusals and failures


def _must_not_be_called(*_: object, **__: object) -> None:
    raise AssertionError("memory was taken for tails that cannot be run")


@pytest.mark.parametrize(
    ("tails", "field", "numbers"),
    [
        ([], "tails", ["0"]),
        ([[1], []], "tails[1]", ["0"]),
        ([[1, 97]], "tails[0]", ["97", "96"]),
        ([[-1]], "tails[0]", ["-1"]),
        ([[1], [1] * (MAX_CONTEXT - 69)], "tails[1]", [str(MAX_CONTEXT - 69), str(MAX_CONTEXT - 70)]),
    ],
)
def test_bad_tails_are_refused_by_field_before_memory_is_held(
    monkeypatch: pytest.MonkeyPatch, tails: list[list[int]], field: str, numbers: list[str]
) -> None:
    engine = engine_of()
    _, context = exact(engine)
    monkeypatch.setattr(engine.pool, "allocate", _must_not_be_called)
    with pytest.raises(InvalidRequest) as caught:
        engine.fork(context, tails)
    assert caught.value.field == field
    assert all(number in caught.value.message + caught.value.actual for number in numbers), caught.value.message
    with pytest.raises(InvalidRequest, match="max_rows"):
        engine.fork(context, [[1]], max_rows=0)


def test_a_closed_context_cannot_be_forked() -> None:
    engine = engine_of()
    _, context = exact(engine)
    context.close()
    with pytest.raises(AssertionError, match="closed"):
        engine.fork(context, [[1]])
    assert_nothing_held(engine)


@pytest.mark.parametrize("num_blocks", range(9, 18))
def test_a_pool_of_any_size_forks_all_or_nothing(num_blocks: int) -> None:
    engine = engine_of(num_blocks=num_blocks)
    _, _, context = linked(engine)
    held, tails = engine.pool.counts()[BlockState.REFERENCED], tails_of((5, 17, 40, 2))
    free = num_blocks - held
    if free < 7:
        with pytest.raises(Busy, match=f"{free} blocks available, 7 are needed") as caught:
            engine.fork(context, tails)
        assert caught.value.retry_after_ms > 0
        engine.pool.check_invariants()
        assert engine.pool.counts()[BlockState.REFERENCED] == held
    else:
        engine.fork(context, tails).close()
    context.close()
    assert_nothing_held(engine)


def test_tails_that_never_fit_evict_nothing_and_are_told_not_to_wait() -> None:
    engine = engine_of(num_blocks=24)
    _, _, context = linked(engine)
    chunk_id = engine.chunk(tokens(30, 9)).chunk_id
    assert chunk_id is not None
    engine.pool.release(engine.compile(chunk_id, tokens(30, 9)).extent)
    with pytest.raises(Busy, match="25 are needed") as caught:
        engine.fork(context, [tokens(16)] * 25)
    assert caught.value.retry_after_ms == 0
    assert chunk_id in engine.resident
    context.close()
    assert_nothing_held(engine)


class Broken(Exception):
    pass


@pytest.mark.parametrize("at_call", range(6))
def test_a_fork_that_breaks_anywhere_leaks_nothing(monkeypatch: pytest.MonkeyPatch, at_call: int) -> None:
    engine = engine_of()
    _, _, context = linked(engine)
    held = engine.pool.counts()
    expected = engine.fork(context, tails_of(), max_rows=45)
    first = [hidden.clone() for hidden in expected.hidden]
    expected.close()
    calls = iter(range(1000))
    original = ForkAttention.__call__

    def broken(self: Any, *args: Any) -> Any:
        if next(calls) == at_call:
            raise Broken
        return original(self, *args)

    monkeypatch.setattr(ForkAttention, "__call__", broken)
    with pytest.raises(Broken):
        engine.fork(context, tails_of(), max_rows=45)  # three passes of two layers
    monkeypatch.undo()
    engine.pool.check_invariants()
    assert engine.pool.counts() == held
    forks = engine.fork(context, tails_of(), max_rows=45)
    assert all(torch.equal(mine, its) for mine, its in zip(forks.hidden, first, strict=True))
    close_all(engine, context, forks)


@pytest.mark.parametrize("at_fork", [0, 1, len(LENS) - 1])
def test_a_fork_that_breaks_while_its_contexts_are_made_leaks_nothing(
    monkeypatch: pytest.MonkeyPatch, at_fork: int
) -> None:
    engine = engine_of()
    _, _, context = linked(engine)
    held = engine.pool.counts()
    calls = iter(range(1000))
    original = Tensor.clone

    def broken(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.ndim == 1 and next(calls) == at_fork:  # the last hidden state of a tail: torch found no memory for it
            raise Broken
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "clone", broken)
    with pytest.raises(Broken):
        engine.fork(context, tails_of())
    monkeypatch.undo()
    assert next(calls) == at_fork + 1, "it broke where it should"
    engine.pool.check_invariants()
    assert engine.pool.counts() == held
    close_all(engine, context, engine.fork(context, tails_of()))
