"""Exact prefix, local chunks and linked chunks in one context; passes in slices; passes that wait."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from engine_worlds import assert_nothing_held, engine_of, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import PREFIX_CHUNK_TOKENS, ChunkKind
from spolia_core.sampling import SamplingParams
from spolia_engine.context import Context
from spolia_engine.engine import Engine
from spolia_engine.link_plan import LinkPlan, plan_link, plan_recompute
from spolia_engine.linked_blocks import LinkedBlock, exact_blocks, linked_chain, num_exact_tokens
from spolia_engine.next_tokens import accept_row
from spolia_engine.passes import PassOptions
from spolia_engine.run import Run
from spolia_engine.sealing import SealedBlock
from spolia_engine.sequence_starts import start_sequence
from spolia_engine.steps import finish

pytestmark = pytest.mark.usefixtures("place")

K = 4
ALIKE = 2e-5  # relative to the scale of the logits


def live(count: int, seed: int) -> Part:
    return Part(tuple(tokens(count, seed)))


def runs_of(engine: Engine, prompt: Prompt, plan: LinkPlan) -> dict[int, Run]:
    runs: dict[int, Run] = {}
    for index in dict.fromkeys(f.part_index for f in plan.fragments):
        part = prompt.parts[index]
        assert part.chunk_id is not None
        runs[index] = engine.resident.acquire(part.chunk_id) or engine.compile(part.chunk_id, part.token_ids)
    return runs


def chain_of(engine: Engine, prompt: Prompt) -> list[bytes]:
    return list(engine.ids.prefix_chain(prompt.token_ids))


def blocks_of(engine: Engine, prompt: Prompt, plan: LinkPlan) -> list[LinkedBlock]:
    chain = linked_chain(prompt, plan, engine.ids, "test", K, chain_of(engine, prompt))
    return list(chain.blocks) if chain else []


class Linked:
    """A context linked with everything that is resident, and what became of it."""

    def __init__(self, engine: Engine, prompt: Prompt, options: PassOptions | None = None) -> None:
        chain = chain_of(engine, prompt)
        prefix = engine.acquire_prefix(chain[: (prompt.num_tokens - 1) // PREFIX_CHUNK_TOKENS])
        self.num_prefix_tokens = len(prefix) * PREFIX_CHUNK_TOKENS
        self.whole = plan_link(prompt, K, num_prefix_tokens=self.num_prefix_tokens)
        blocks = blocks_of(engine, prompt, self.whole)
        held: list[Run] = []
        if num_exact_tokens(self.whole) == self.num_prefix_tokens:
            held = engine.acquire_prefix([block.chunk_id for block in blocks])
            if blocks and sum(run.num_tokens for run in held) == len(self.whole.positions):
                engine.pool.release(held.pop().extent)
        plan = self.whole.without_first_rows(sum(run.num_tokens for run in held))
        self.context: Context = finish(
            engine.linked_context_steps(
                prompt, runs_of(engine, prompt, plan), plan, [*prefix, *held], options or PassOptions()
            )
        )
        self.context.check_invariants()
        self.num_computed = len(plan.positions)
        self.blocks = [*exact_blocks(self.whole, chain), *blocks]
        self.fresh = engine.register_linked(self.context, plan, self.blocks)
        assert self.context.last_hidden is not None
        self.logits = engine.adapter.logits(self.context.last_hidden[None])[0]


def plain_logits(prompt: Prompt, plan: LinkPlan | None = None) -> torch.Tensor:
    """What a link pass without any cached KV says."""
    engine = engine_of()
    plan = plan or plan_link(prompt, K)
    context = engine.linked_context(prompt, runs_of(engine, prompt, plan), plan)
    assert context.last_hidden is not None
    return engine.adapter.logits(context.last_hidden[None])[0]


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).abs().max()) <= ALIKE * max(1.0, float(expected.abs().max()))


def documents(engine: Engine, sizes: Sequence[int], head: int, question: int = 9, seed: int = 0) -> Prompt:
    parts = [engine.chunk(tokens(size, seed=100 + index)) for index, size in enumerate(sizes)]
    return Prompt(
        ((live(head, 1),) if head else ()) + tuple(parts) + ((live(question, 50 + seed),) if question else ())
    )


@pytest.mark.parametrize("sizes", [(60, 40), (200,), (60, 300, 5)])
@pytest.mark.parametrize("head", [0, 20, 128, 300])
@pytest.mark.parametrize("question", [0, 9, 128, 290])
@pytest.mark.parametrize("num_answer", [1, 100, 128, 400])
def test_an_answer_goes_on_with_the_chunks_of_the_longer_prompt(
    sizes: Sequence[int], head: int, question: int, num_answer: int
) -> None:
    """Without a question, a document ends the prompt: its last token is recomputed, and the answer joins it."""
    engine = engine_of()
    prompt = documents(engine, sizes, head, question)
    plan = plan_link(prompt, K)
    chain = linked_chain(prompt, plan, engine.ids, "test", K, chain_of(engine, prompt))
    assert chain is not None
    answer_ids = tokens(num_answer, 77)
    longer = Prompt((*prompt.parts, Part(tuple(answer_ids))))
    whole = plan_recompute(longer, plan.positions)
    assert [*chain.blocks, *chain.end.blocks(answer_ids)] == blocks_of(engine, longer, whole)


def test_a_repeated_prompt_recomputes_its_question_only() -> None:
    engine = engine_of()
    first = Linked(engine, documents(engine, (60, 40, 70), head=20))
    assert first.num_computed == 20 + 3 * K + 9
    first.context.close()
    again = Linked(engine, documents(engine, (60, 40, 70), head=20, seed=1))
    assert again.num_computed == 9
    assert_alike(again.logits, plain_logits(documents(engine, (60, 40, 70), head=20, seed=1)))
    again.context.close()
    assert_nothing_held(engine)


def test_another_order_finds_local_chunks_only() -> None:
    engine = engine_of()
    Linked(engine, documents(engine, (60, 40, 70), head=20)).context.close()
    parts = documents(engine, (60, 40, 70), head=20).parts
    shuffled = Prompt((parts[0], parts[2], parts[1], parts[3], parts[4]))
    other = Linked(engine, shuffled)
    # The head and the link tokens of another first document differ: nothing linked can match.
    assert other.num_computed == 20 + 3 * K + 9
    assert_alike(other.logits, plain_logits(shuffled))
    other.context.close()


def test_the_head_of_a_linked_prompt_becomes_prefix_chunks_that_exact_prompts_find() -> None:
    engine = engine_of()
    prompt = documents(engine, (60, 40), head=300)
    Linked(engine, prompt).context.close()
    assert len(engine.resident.held(ChunkKind.PREFIX)) == 2
    exact = engine.generate(Prompt.live(prompt.token_ids), SamplingParams(max_tokens=4))
    assert (
        exact.token_ids == engine_of().generate(Prompt.live(prompt.token_ids), SamplingParams(max_tokens=4)).token_ids
    )


def test_a_first_pass_without_prefix_and_a_second_with_it_agree_on_ids() -> None:
    engine = engine_of()
    prompt = documents(engine, (60, 40), head=300)
    first = Linked(engine, prompt)
    first.context.close()
    again = Linked(engine, prompt)
    assert (again.num_prefix_tokens, again.num_computed) == (256, 9)
    assert again.fresh == []
    again.context.close()


def test_an_exact_prefix_may_end_inside_a_document() -> None:
    engine = engine_of()
    prompt = documents(engine, (200, 90), head=30)
    engine.generate(Prompt.live(prompt.token_ids[:140]), SamplingParams(max_tokens=1))
    found = Linked(engine, prompt)
    assert found.num_prefix_tokens == 128
    assert [(f.start, f.end) for f in found.whole.fragments] == [(98, 200), (K, 90)]
    assert found.num_computed == K + 9
    exact = Prompt.live(prompt.token_ids)
    recompute_rest = plan_recompute(exact, range(128, exact.num_tokens), num_prefix_tokens=128)
    assert recompute_rest.fragments == ()
    found.context.close()
    assert_nothing_held(engine)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(1, 150), min_size=1, max_size=4),
    st.integers(0, 280),
    st.integers(1, 150),
    st.sampled_from([None, 1, 7, 64, 1000]),
)
def test_whatever_is_held_the_answer_is_that_of_a_plain_link(
    sizes: list[int], head: int, question: int, slice_tokens: int | None
) -> None:
    engine = engine_of()
    prompt = documents(engine, sizes, head, question)
    expected = plain_logits(prompt)
    options = PassOptions(slice_tokens=slice_tokens)
    for _ in range(2):
        linked = Linked(engine, prompt, options)
        assert_alike(linked.logits, expected)
        ends = [block.position + block.num_tokens for block in linked.blocks]
        assert all(0 < block.num_tokens <= PREFIX_CHUNK_TOKENS for block in linked.blocks)
        assert ends == sorted(ends)
        linked.context.close()
    assert_nothing_held(engine)


def test_an_answer_behind_linked_chunks_is_sealed_for_the_next_turn() -> None:
    engine = engine_of()
    prompt = documents(engine, (60, 40), head=20)
    linked = Linked(engine, prompt)
    sequence = start_sequence(linked.context, engine.generation(SamplingParams(max_tokens=300)))
    sequence.generation.accept(engine.decoding.first_token(linked.context, sequence.generation.params))
    while not sequence.finished:
        accept_row(sequence.generation, engine.decoding.step_logits([sequence])[0])
    answer = sequence.generation.token_ids
    longer = Prompt((*prompt.parts, Part(tuple(answer[:-1]))))
    whole = plan_recompute(longer, linked.whole.positions)
    blocks: list[SealedBlock] = [b for b in blocks_of(engine, longer, whole) if b.end > prompt.num_tokens]
    sealed = engine.seal_answer(sequence, blocks)
    assert [run.num_tokens for _, run in sealed] == [128, 128]
    engine.pool.release(sealed[0][1].extent)
    engine.decoding.forget_plan()
    sequence.close()
    turn = Prompt((*longer.parts, live(5, 9)))
    again = Linked(engine, turn)
    assert again.num_computed < 9 + len(answer) + 5 - 2 * 128 + 1
    assert_alike(again.logits, plain_logits(turn))
    again.context.close()
    assert_nothing_held(engine)


def test_a_pass_waits_for_layers_and_uses_each_as_it_comes() -> None:
    engine = engine_of("llama-deep")
    prompt = documents(engine, (60,), head=20)
    plan = plan_link(prompt, K)
    here = 0
    done: list[int] = []
    options = PassOptions(ready=lambda layer: layer < here, on_layer=lambda run, layer: done.append(layer))
    steps = engine.linked_context_steps(prompt, runs_of(engine, prompt, plan), plan, (), options)
    for here in range(4):
        pause = next(steps)
        assert pause.ready is not None
        assert not pause.ready()
        assert done == list(range(here))
    here = 4
    with pytest.raises(StopIteration) as end:
        next(steps)
    end.value.value.close()
    assert_nothing_held(engine)


def test_a_pass_given_up_between_slices_frees_everything() -> None:
    engine = engine_of()
    prompt = documents(engine, (60, 40), head=200)
    plan = plan_link(prompt, K)
    steps = engine.linked_context_steps(prompt, runs_of(engine, prompt, plan), plan, (), PassOptions(slice_tokens=50))
    assert next(steps).num_tokens == 50
    steps.close()
    compiling = engine.compile_steps(b"c" * 32, tokens(100), PassOptions(slice_tokens=30))
    next(compiling)
    compiling.close()
    assert_nothing_held(engine)


def test_slices_behind_sinks_equal_one_pass() -> None:
    whole, sliced = engine_of("llama-bos", num_sink_tokens=3), engine_of("llama-bos", num_sink_tokens=3)
    expected = whole.compile(b"c", tokens(100))
    found = finish(sliced.compile_steps(b"c", tokens(100), PassOptions(slice_tokens=30)))
    assert (found.num_tokens, found.rope_base) == (expected.num_tokens, 0)
    slots, other = (slice(run.start, run.start + 100) for run in (found, expected))
    torch.testing.assert_close(found.extent.key[:, :, slots], expected.extent.key[:, :, other], atol=1e-5, rtol=1e-5)
    whole.pool.release(expected.extent)
    sliced.pool.release(found.extent)
