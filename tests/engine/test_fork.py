"""Forking: many tails behind one context, each as if it alone followed it, over one copy of what they share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
import torch
from engine_worlds import (
    check_greedy,
    engine_of,
    letters,
    model_of,
    oracle_greedy,
    oracle_logits,
    oracle_of,
    step,
    tokens,
)
from fork_worlds import assert_near, close_all, exact, linked, logits_of, tails_of
from hypothesis import given, settings
from hypothesis import strategies as st
from link_oracle import link
from torch import Tensor

from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import PREFIX_CHUNK_TOKENS
from spolia_core.sampling import SamplingParams
from spolia_engine import attention
from spolia_engine.adapter import ModelAdapter
from spolia_engine.engine import Engine
from spolia_engine.fork import plan_passes
from spolia_engine.link_plan import plan_link
from spolia_engine.next_tokens import accept_row
from spolia_engine.sequence_starts import start_sequence
from spolia_kernels import Kernels, SpanPass, SpanRange, kernels, torch_kernels_only

pytestmark = pytest.mark.usefixtures("place")


# Each tail as if it alone followed the context


@pytest.mark.parametrize("name", ["llama", "llama-yarn", "llama-mqa", "llama-mha", "qwen2", "qwen3", "mistral"])
def test_forks_of_an_exact_context_are_the_models_own_forward(name: str) -> None:
    engine = engine_of(name)
    ids, context = exact(engine)
    forks = engine.fork(context, tails_of())
    for fork, logits, tail in zip(forks.contexts, logits_of(engine, forks), tails_of(), strict=True):
        fork.check_invariants()
        assert (fork.num_tokens, fork.num_computed_tokens, fork.is_exact) == (70 + len(tail), len(tail), True)
        assert_near(logits, oracle_logits(oracle_of(name), [*ids, *tail])[70:])
    close_all(engine, context, forks)


@pytest.mark.parametrize(("k", "last_is_chunk"), [(0, False), (4, False), (4, True), (100, False)])
@pytest.mark.parametrize("name", ["llama", "llama-yarn", "qwen3"])
def test_forks_of_a_linked_context_are_links_of_the_longer_prompt(name: str, k: int, last_is_chunk: bool) -> None:
    engine = engine_of(name)
    prompt, plan, context = linked(engine, k, last_is_chunk=last_is_chunk)
    forks = engine.fork(context, tails_of())
    for fork, logits, tail in zip(forks.contexts, logits_of(engine, forks), tails_of(), strict=True):
        fork.check_invariants()
        longer = Prompt((*prompt.parts, Part(tuple(tail))))
        rows = [*plan.positions, *range(prompt.num_tokens, longer.num_tokens)]
        assert_near(logits, link(oracle_of(name), longer, rows).logits[-len(tail) :])
    close_all(engine, context, forks)


def test_forks_behind_a_reused_prefix_read_all_of_it() -> None:
    engine, ids = engine_of(), tokens(300)
    engine.generate(Prompt.live(ids), SamplingParams(max_tokens=1))
    chain = list(engine.ids.prefix_chain(ids))
    context = engine.exact_context(ids, engine.acquire_prefix(chain))
    assert context.num_computed_tokens == 300 - 2 * PREFIX_CHUNK_TOKENS
    forks = engine.fork(context, tails_of((9, 9)))
    for logits, tail in zip(logits_of(engine, forks), tails_of((9, 9)), strict=True):
        assert_near(logits, oracle_logits(oracle_of("llama"), [*ids, *tail])[300:])
    close_all(engine, context, forks)


def test_forks_of_forks_go_on_from_where_each_stands() -> None:
    engine = engine_of()
    ids, context = exact(engine)
    first, second = tails_of((6, 3)), tails_of((4, 12))
    forks = engine.fork(context, first)
    again = engine.fork(forks.contexts[1], second)
    for logits, tail in zip(logits_of(engine, again), second, strict=True):
        assert_near(logits, oracle_logits(oracle_of("llama"), [*ids, *first[1], *tail])[73:])
    forks.close()
    close_all(engine, context, again)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 120))
@settings(max_examples=40, deadline=None)
def test_whatever_the_lengths_and_passes_a_tail_is_as_when_it_is_alone(lens: list[int], max_rows: int) -> None:
    engine = engine_of(num_blocks=256)
    _, _, context = linked(engine)
    together = engine.fork(context, tails_of(lens), max_rows=max_rows)
    for tail, mine in zip(tails_of(lens), together.hidden, strict=True):
        alone = engine.fork(context, [tail])
        assert_near(mine, alone.hidden[0])
        alone.close()
    for fork, hidden in zip(together.contexts, together.hidden, strict=True):
        assert fork.last_hidden is not None
        assert torch.equal(fork.last_hidden, hidden[-1])
    close_all(engine, context, together)


def test_the_order_of_tails_changes_nothing() -> None:
    engine = engine_of()
    _, _, context = linked(engine)
    tails = tails_of((3, 20, 3))
    expected = engine.fork(context, tails)
    for order in permutations(range(3)):
        forks = engine.fork(context, [tails[i] for i in order])
        for index, hidden in zip(order, forks.hidden, strict=True):
            assert_near(hidden, expected.hidden[index])
        forks.close()
    close_all(engine, context, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_forks_are_near_the_pass_that_runs_alone(dtype: str) -> None:
    model = type(model_of("llama"))(model_of("llama").config)
    model.load_state_dict(model_of("llama").state_dict())
    engine = Engine(ModelAdapter(model, dtype=dtype), letters, num_blocks=256)
    _, _, context = linked(engine)
    forks = engine.fork(context, tails_of())
    for tail, logits in zip(tails_of(), logits_of(engine, forks), strict=True):
        alone = engine.fork(context, [tail])
        agreement = torch.cosine_similarity(logits, logits_of(engine, alone)[0], dim=-1)
        assert float(agreement.min()) > 0.99
        alone.close()
    close_all(engine, context, forks)


# Decoding from forks


@pytest.mark.parametrize("close_first", ["context", "forks"])
def test_forks_decode_to_the_tokens_of_unforked_contexts(close_first: str) -> None:
    engine, count = engine_of("qwen3"), 12
    ids, context = exact(engine)
    forks = engine.fork(context, tails_of())
    if close_first == "context":
        context.close()
    params = SamplingParams(max_tokens=count)
    sequences = []
    for fork in forks.contexts:
        generation = engine.generation(params)
        generation.accept(engine.decoding.first_token(fork, params))
        sequences.append(start_sequence(fork, generation))
    for _ in range(count - 1):  # all of them in one batch, sharing the context's KV
        for sequence, logits in zip(sequences, engine.decoding.step_logits(sequences), strict=True):
            accept_row(sequence.generation, logits)
    for sequence, tail in zip(sequences, tails_of(), strict=True):
        expected, margins = oracle_greedy(oracle_of("qwen3"), [*ids, *tail], count)
        assert check_greedy(sequence.generation.token_ids, expected, margins) >= 4
        sequence.close()
    engine.decoding.forget_plan()
    close_all(engine, context, forks)


def test_linked_forks_decode_to_the_tokens_of_the_unforked_link() -> None:
    engine, params = engine_of(), SamplingParams(max_tokens=10)
    prompt, _, context = linked(engine)
    tails = tails_of((11, 4, 29))
    forks = engine.fork(context, tails)
    for fork, tail in zip(forks.contexts, tails, strict=True):
        generation = engine.generation(params)
        generation.accept(engine.decoding.first_token(fork, params))
        sequence = start_sequence(fork, generation)
        while not sequence.finished:
            step(engine, sequence)
        engine.decoding.forget_plan()
        sequence.close()
        longer = Prompt((*prompt.parts, Part(tuple(tail))))
        plan = plan_link(longer, 4)
        runs = {}
        for index in dict.fromkeys(f.part_index for f in plan.fragments):
            part = longer.parts[index]
            assert part.chunk_id is not None
            run = engine.resident.acquire(part.chunk_id)
            assert run is not None
            runs[index] = run
        unforked = start_sequence(engine.linked_context(longer, runs, plan), engine.generation(params))
        unforked.generation.accept(engine.decoding.first_token(unforked.context, params))
        while not unforked.finished:
            step(engine, unforked)
        engine.decoding.forget_plan()
        unforked.close()
        assert generation.token_ids == unforked.generation.token_ids
    close_all(engine, context, forks)


def test_a_forks_full_blocks_become_prefix_chunks() -> None:
    engine = engine_of()
    ids, context = exact(engine)
    tail = tokens(200, 9)
    forks = engine.fork(context, [tail, tokens(3, 8)])
    chain = list(engine.ids.prefix_chain([*ids, *tail]))
    found = engine.register_prefix(forks.contexts[0], chain)
    assert [run.rope_base for _, run in found] == [128]  # the block from 0 lies partly in the shared run
    close_all(engine, context, forks)
    again = engine.resident.acquire(chain[1])
    assert again is not None
    engine.pool.release(again.extent)
    fresh = engine.exact_context([*ids, *tail], [])
    stored = again.extent.value[:, :, again.start : again.start + 128]
    torch.testing.assert_close(stored, fresh.spans[0].run.extent.value[:, :, 128:256], atol=2e-5, rtol=1e-5)
    fresh.close()


def test_a_shared_range_is_attended_once_for_the_rows_of_all_tails(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    _, _, context = linked(engine)
    seen: list[tuple[int, int, int]] = []
    original = attention.attend

    def counting(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        seen.append((key.data_ptr(), key.shape[1], query.shape[1]))
        return original(query, key, value, **kwargs)

    monkeypatch.setattr(attention, "attend", counting)
    tails = tails_of()
    with torch_kernels_only():
        forks = engine.fork(context, tails)
    expected = [
        (r.extent.key[layer][:, r.start : r.end].data_ptr(), r.end - r.start, sum(map(len, tails)))
        for layer in range(engine.adapter.num_layers)
        for r in context.ranges
    ]
    assert sorted(seen) == sorted(expected)
    monkeypatch.undo()
    close_all(engine, context, forks)


@pytest.mark.skipif(not isinstance(kernels(), Kernels), reason="no machine code on this machine")
def test_machine_code_is_given_a_shared_range_once_for_the_rows_of_all_tails(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    if engine.adapter.device.type != "cpu" or engine.adapter.compute_dtype != "float32":
        pytest.skip("machine code is for float32 on a CPU")
    _, _, context = linked(engine)
    told: list[tuple[int, int, tuple[int, ...]]] = []

    def recording(here: Any, heads: Any, ranges: list[SpanRange], *args: Any, **kwargs: Any) -> SpanPass:
        told.extend((r.key.data_ptr(), r.key.shape[2], r.rows) for r in ranges)
        return SpanPass(here, heads, ranges, *args, **kwargs)

    monkeypatch.setattr(attention, "SpanPass", recording)
    tails = tails_of()
    forks = engine.fork(context, tails)
    every = tuple(range(sum(map(len, tails))))
    expected = [(r.extent.key[:, :, r.start :].data_ptr(), r.end - r.start, every) for r in context.ranges]
    assert sorted(told) == sorted(expected)
    monkeypatch.undo()
    close_all(engine, context, forks)


# Passes


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 60))
def test_passes_hold_every_tail_once_and_no_more_rows_than_allowed(lens: list[int], max_rows: int) -> None:
    passes = list(plan_passes(lens, max_rows))
    assert sorted(i for indices in passes for i in indices) == list(range(len(lens)))
    for indices in passes:
        assert [lens[i] for i in indices] == sorted(lens[i] for i in indices)
        assert len(indices) == 1 or sum(lens[i] for i in indices) <= max_rows


def test_no_pass_has_more_rows_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    _, _, context = linked(engine)
    rows: list[int] = []
    original = type(engine.adapter).forward

    def counting(self: Any, token_ids: Sequence[int], *args: Any) -> Any:
        rows.append(len(token_ids))
        return original(self, token_ids, *args)

    monkeypatch.setattr(type(engine.adapter), "forward", counting)
    forks = engine.fork(context, tails_of(), max_rows=45)
    assert rows == [45, 40, 64]  # 1 + 2 + 3 + 5 + 17 + 17, then one that fills a pass, then one longer than any
    monkeypatch.undo()
    close_all(engine, context, forks)


def test_padding_never_counts() -> None:
    """The longest tail's last keys are far: what pads a shorter one must not reach its rows."""
    engine = engine_of()
    _, context = exact(engine)
    short = tokens(9, 1)
    alone = engine.fork(context, [short])
    beside = engine.fork(context, [short, tokens(15, 2)])  # 9 and 15 share a batch, 9 is padded
    assert_near(beside.hidden[0], alone.hidden[0])
    alone.close()
    close_all(engine, context, beside)
