"""Slices of several passes that go through the model at once: each is as if it went alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_worlds import assert_nothing_held, engine_of, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia_core.errors import InternalError
from spolia_core.prompt import Part, Prompt
from spolia_core.sampling import SamplingParams
from spolia_engine.attention import ContextAttention, VisibleRanges
from spolia_engine.context import Context, release_runs
from spolia_engine.decode_attention import DecodeAttention
from spolia_engine.device_decoding import DrawnRow
from spolia_engine.engine import Engine
from spolia_engine.joint_pass import run_slices
from spolia_engine.link_plan import plan_link
from spolia_engine.next_tokens import accept_row
from spolia_engine.passes import PassOptions
from spolia_engine.run import Run
from spolia_engine.sequence import Sequence as DecodeSequence
from spolia_engine.sequence import close_all
from spolia_engine.sequence_starts import start_sequence
from spolia_engine.side_by_side import SideBySide
from spolia_engine.steps import Ran, Slice, Steps, finish

ALIKE = 2e-5  # relative to the scale of what is compared
K = 4


def together(engine: Engine, passes: Sequence[Steps[Context]]) -> list[Context | BaseException]:
    """What each pass came to; whoever stands at a slice goes through the model with all others who do."""
    ended: dict[int, Context | BaseException] = {}
    standing: dict[int, Slice] = {}

    def go_on(number: int, came: Ran | BaseException | None) -> None:
        steps = passes[number]
        try:
            pause = steps.throw(came) if isinstance(came, BaseException) else steps.send(came)
            while pause.slice is None:
                pause = next(steps)
            standing[number] = pause.slice
        except StopIteration as end:
            ended[number] = end.value
        except BaseException as error:
            ended[number] = error

    for number in range(len(passes)):
        go_on(number, None)
    while standing:
        now, standing = standing, {}
        for number, came in zip(now, run_slices(engine.adapter, list(now.values())), strict=True):
            go_on(number, came)
    return [ended[number] for number in range(len(passes))]


def run_on(engine: Engine, steps: Steps[Context], came: Ran | BaseException) -> Context:
    """What a pass comes to that stands at a slice; its other slices go alone."""
    try:
        assert isinstance(came, Ran)
        pause = steps.send(came)
        while True:
            if pause.slice is None:
                pause = next(steps)
            else:
                (came,) = run_slices(engine.adapter, [pause.slice])
                assert isinstance(came, Ran)
                pause = steps.send(came)
    except StopIteration as end:
        context: Context = end.value
        return context


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((got - expected).abs().max()) <= ALIKE * float(expected.abs().max())


def kv_of(context: Context) -> list[torch.Tensor]:
    """KV of the rows that were computed, key and value."""
    run = context.live
    assert run is not None
    rows = slice(run.start, run.start + run.num_tokens)
    return [torch.stack([m[:, rows] for m in memory]) for memory in (run.extent.key, run.extent.value)]


class Asked:
    """A pass to run: a prompt behind a cached prefix, or one linked over documents that stand in any order."""

    def __init__(self, num_tokens: int, num_prefix_blocks: int, order: Sequence[int], slice_tokens: int) -> None:
        self.ids = tokens(num_tokens + 128 * num_prefix_blocks, seed=num_tokens)
        self.order = order
        self.slice_tokens = slice_tokens

    def steps(self, engine: Engine, *, joins: bool) -> Steps[Context]:
        options = PassOptions(self.slice_tokens, joins=joins)
        if not self.order:
            prefix = engine.acquire_prefix(list(engine.ids.prefix_chain(self.ids))[: (len(self.ids) - 1) // 128])
            return engine.exact_context_steps(self.ids, prefix, options)
        documents = [Part(tuple(tokens(40 + 9 * i, seed=50 + i)), b"%d" % i) for i in self.order]
        prompt = Prompt((Part(tuple(self.ids[:5])), *documents, Part(tuple(self.ids))))
        plan = plan_link(prompt, K, num_sink_tokens=engine.recipe.num_sink_tokens)
        runs: dict[int, Run] = {}
        for index in dict.fromkeys(f.part_index for f in plan.fragments):
            part = prompt.parts[index]
            assert part.chunk_id is not None
            runs[index] = engine.resident.acquire(part.chunk_id) or engine.compile(part.chunk_id, part.token_ids)
        return engine.linked_context_steps(prompt, runs, plan, options=options)

    def with_prefix_cached(self, engine: Engine, num_blocks: int) -> None:
        head = self.ids[: 128 * num_blocks]
        if head:
            context = engine.exact_context(head, [])
            engine.register_prefix(context, list(engine.ids.prefix_chain(head)))
            context.close()


asked = st.builds(
    Asked,
    num_tokens=st.integers(1, 70),
    num_prefix_blocks=st.integers(0, 1),
    order=st.lists(st.integers(0, 3), max_size=3, unique=True),
    slice_tokens=st.sampled_from([16, 33, 1000]),
)


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama-yarn"])
@settings(max_examples=12, deadline=None)
@given(passes=st.lists(asked, min_size=1, max_size=6))
def test_each_pass_is_as_if_it_ran_alone(name: str, passes: list[Asked]) -> None:
    engine = engine_of(name)
    for each in passes:
        each.with_prefix_cached(engine, len(each.ids) // 128)
    alone = [finish(each.steps(engine, joins=False)) for each in passes]
    joined = together(engine, [each.steps(engine, joins=True) for each in passes])
    for one, other in zip(alone, joined, strict=True):
        assert isinstance(other, Context)
        assert one.num_computed_tokens == other.num_computed_tokens
        assert one.last_hidden is not None
        assert other.last_hidden is not None
        assert same(other.last_hidden, one.last_hidden)
        assert all(map(same, kv_of(other), kv_of(one)))
        one.close()
        other.close()
    assert_nothing_held(engine)


def test_chunks_behind_sinks_are_as_if_compiled_alone() -> None:
    engine = engine_of("llama-bos", num_sink_tokens=4)
    documents = [tokens(count, seed=count) for count in (3, 40, 17, 40)]
    alone = [engine.compile(b"alone %d" % i, ids) for i, ids in enumerate(documents)]
    passes = [engine.compile_steps(b"%d" % i, ids, PassOptions(joins=True)) for i, ids in enumerate(documents)]
    joined = together(engine, passes)  # type: ignore[arg-type]  # runs where contexts are named
    for one, other in zip(alone, joined, strict=True):
        assert isinstance(other, Run)
        assert (other.num_tokens, other.rope_base) == (one.num_tokens, one.rope_base)
        for mine, its in zip((other.extent.key, other.extent.value), (one.extent.key, one.extent.value), strict=True):
            rows = slice(one.start, one.start + one.num_tokens)
            assert all(same(mine[layer][:, rows], its[layer][:, rows]) for layer in range(len(mine)))
    release_runs(engine.pool, [*alone, *(run for run in joined if isinstance(run, Run))])
    assert_nothing_held(engine)


class Broken(Exception):
    pass


def test_a_listener_that_raises_ends_its_own_pass_and_no_other() -> None:
    engine, seen = engine_of(), list[int]()

    def breaks(run: Run, layer: int) -> None:
        raise Broken

    listeners = [None, breaks, lambda run, layer: seen.append(layer)]
    passes = [
        engine.exact_context_steps(tokens(20 + i), [], PassOptions(on_layer=listener, joins=True))
        for i, listener in enumerate(listeners)
    ]
    first, second, third = together(engine, passes)
    assert isinstance(second, Broken)
    assert seen == [0, 1]
    for context, count in ((first, 20), (third, 22)):
        assert isinstance(context, Context)
        assert context.last_hidden is not None
        expected = engine.exact_context(tokens(count), [])
        assert expected.last_hidden is not None
        assert same(context.last_hidden, expected.last_hidden)
        expected.close()
        context.close()
    assert_nothing_held(engine)


def test_a_model_that_raises_ends_every_pass_and_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()

    def breaks(*_: object) -> None:
        raise Broken

    monkeypatch.setattr(engine.adapter, "forward_steps", breaks)
    passes = [engine.exact_context_steps(tokens(count), [], PassOptions(joins=True)) for count in (8, 300)]
    errors = together(engine, passes)
    assert [type(error) for error in errors] == [InternalError, InternalError]
    assert errors[0] is not errors[1], "each may be added to"
    assert all(isinstance(error, InternalError) and isinstance(error.__cause__, Broken) for error in errors)
    alone = together(engine, [engine.exact_context_steps(tokens(8), [], PassOptions(joins=True))])
    assert [type(error) for error in alone] == [Broken]
    assert_nothing_held(engine)


def test_a_slice_that_breaks_ends_its_own_pass_and_neither_others_nor_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    sequences = started(engine, [5, 9])
    passes = [engine.exact_context_steps(tokens(count), [], PassOptions(joins=True)) for count in (20, 21, 22)]
    slices = [pause.slice for pause in map(next, passes) if pause.slice is not None]
    original = ContextAttention.write

    def breaks(self: ContextAttention, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        if key.shape[1] == 21:
            raise Broken
        original(self, layer, key, value)

    monkeypatch.setattr(ContextAttention, "write", breaks)
    found = engine.decoding.step_beside(sequences, slices)
    first, second, third = found.slices
    monkeypatch.undo()
    assert isinstance(second, Broken)
    for steps, came, count in ((passes[0], first, 20), (passes[2], third, 22)):
        context, expected = run_on(engine, steps, came), engine.exact_context(tokens(count), [])
        assert all(map(same, kv_of(context), kv_of(expected)))
        context.close()
        expected.close()
    again = started(engine, [5, 9])
    assert same(logits_of(found.step), engine.decoding.step_logits(again))
    passes[1].close()
    close_all([*sequences, *again])
    engine.decoding.forget_plan()
    assert_nothing_held(engine)


def started(engine: Engine, counts: Sequence[int]) -> list[DecodeSequence]:
    """Sequences that decode, two of them behind one prefix; each has its first token."""
    head = tokens(128, seed=3)
    sequences = []
    for count in counts:
        prefix = engine.acquire_prefix(list(engine.ids.prefix_chain(head)))
        context = engine.exact_context([*head, *tokens(count, seed=count)], prefix)
        engine.register_prefix(context, list(engine.ids.prefix_chain(head)))
        sequences.append(start_sequence(context, engine.generation(SamplingParams(max_tokens=20))))
    for sequence, row in zip(sequences, engine.decoding.logits_after([s.context for s in sequences]), strict=True):
        accept_row(sequence.generation, row)
    return sequences


@settings(max_examples=12, deadline=None)
@given(passes=st.lists(asked, min_size=1, max_size=4), counts=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_a_step_beside_slices_is_as_if_both_went_alone(passes: list[Asked], counts: list[int]) -> None:
    engine = engine_of()
    for each in passes:
        each.with_prefix_cached(engine, len(each.ids) // 128)
    alone, beside = started(engine, counts), started(engine, counts)
    joining = [each.steps(engine, joins=True) for each in passes]
    slices = [pause.slice for pause in map(next, joining) if pause.slice is not None]
    expected = engine.decoding.step_logits(alone)
    found = engine.decoding.step_beside(beside, slices)
    assert same(logits_of(found.step), expected)
    for one, other in zip(alone, beside, strict=True):
        assert one.tail.length == other.tail.length == 1
        assert same(_newest_kv(other), _newest_kv(one))
    for each, steps, came in zip(passes, joining, found.slices, strict=True):
        assert isinstance(came, Ran)
        (own,) = together(engine, [each.steps(engine, joins=True)])
        mine = run_on(engine, steps, came)
        assert isinstance(own, Context)
        assert all(map(same, kv_of(mine), kv_of(own)))
        own.close()
        mine.close()
    close_all([*alone, *beside])
    engine.decoding.forget_plan()
    assert_nothing_held(engine)


def logits_of(rows: Sequence[torch.Tensor | DrawnRow]) -> torch.Tensor:
    return torch.stack([row.logits if isinstance(row, DrawnRow) else row for row in rows])


def _newest_kv(sequence: DecodeSequence) -> torch.Tensor:
    run = sequence.tail.span.run
    at = run.start + sequence.tail.length - 1
    return torch.stack([m[:, at] for memory in (run.extent.key, run.extent.value) for m in memory])


def test_a_step_that_breaks_beside_slices_can_be_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    sequences = started(engine, [5, 9])
    steps = engine.exact_context_steps(tokens(30), [], PassOptions(joins=True))
    rows = next(steps).slice
    assert rows is not None
    original = DecodeAttention.__call__

    def breaks(self: DecodeAttention, layer: int, *args: Any) -> torch.Tensor:
        if layer == 1:
            raise Broken
        return original(self, layer, *args)

    monkeypatch.setattr(DecodeAttention, "__call__", breaks)
    with pytest.raises(Broken):
        engine.decoding.step_beside(sequences, [rows])
    monkeypatch.undo()
    assert [sequence.tail.length for sequence in sequences] == [0, 0]
    again = engine.decoding.step_beside(sequences, [rows])
    expected = started(engine, [5, 9])
    assert same(logits_of(again.step), engine.decoding.step_logits(expected))
    assert isinstance(again.slices[0], Ran)
    steps.close()
    close_all([*sequences, *expected])
    engine.decoding.forget_plan()
    assert_nothing_held(engine)


@pytest.mark.parametrize("beside", [False, True])
def test_a_slice_costs_what_it_reads_alone_and_of_the_rest_its_rows(
    monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    """In a time that passes in attention only: in two layers a second a row of the pass, five to read a context."""
    engine, now = engine_of(), [0.0]
    sequences = started(engine, [5, 9])
    head = engine.acquire_prefix(list(engine.ids.prefix_chain(tokens(128, seed=3))))
    prompts = [([*tokens(128, seed=3), *tokens(30)], head), (tokens(10), [])]
    passes = [engine.exact_context_steps(ids, prefix, PassOptions(joins=True)) for ids, prefix in prompts]
    slices = [pause.slice for pause in map(next, passes) if pause.slice is not None]
    takes(monkeypatch, now, SideBySide, "attend", 40 / 2)
    takes(monkeypatch, now, VisibleRanges, "add_to", lambda ranges: 5 * len(ranges._visible))
    takes(monkeypatch, now, DecodeAttention, "__call__", 1000)
    monkeypatch.setattr("spolia_engine.joint_pass.time", SimpleNamespace(perf_counter=lambda: now[0]))
    found = engine.decoding.step_beside(sequences, slices).slices if beside else run_slices(engine.adapter, slices)
    long, short = [came.seconds for came in found if isinstance(came, Ran)]
    shared_s = 40 * 40 / 42 if beside else 40  # two rows of the step share the weights
    assert long == pytest.approx(2 * 5 + shared_s * 30 / 40)
    assert short == pytest.approx(shared_s * 10 / 40)
    for steps in passes:
        steps.close()
    close_all(sequences)
    engine.decoding.forget_plan()
    assert_nothing_held(engine)


def takes(
    monkeypatch: pytest.MonkeyPatch, now: list[float], kind: type, name: str, seconds: float | Callable[[Any], float]
) -> None:
    """Lets each call of a method take so long."""
    original = getattr(kind, name)

    def timed(self: Any, *args: Any) -> Any:
        now[0] += seconds(self) if callable(seconds) else seconds
        return original(self, *args)

    monkeypatch.setattr(kind, name, timed)


def test_a_pass_given_up_at_its_slice_frees_everything() -> None:
    engine = engine_of()
    steps = engine.exact_context_steps(tokens(40), [], PassOptions(joins=True))
    assert next(steps).slice is not None
    steps.close()
    assert_nothing_held(engine)


def test_work_that_wants_others_rows_cannot_be_finished_alone() -> None:
    engine = engine_of()
    with pytest.raises(AssertionError, match="engine thread"):
        finish(engine.exact_context_steps(tokens(4), [], PassOptions(joins=True)))
    assert_nothing_held(engine)
