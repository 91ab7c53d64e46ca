"""The two laws of linking, and the laws of the plan behind it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from engine_worlds import assert_nothing_held, engine_of, oracle_of, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from link_oracle import dense_forward
from link_worlds import LAW_2, check_law_1, link_here, live, relative_error

from spolia_core.errors import InvalidRequest
from spolia_core.prompt import Part, Prompt
from spolia_engine.engine import Engine
from spolia_engine.link_plan import LinkPlan, plan_link, plan_recompute

pytestmark = pytest.mark.usefixtures("place")


def several_chunks(engine: Engine) -> Prompt:
    """Live text first, chunks at several offsets, one of them twice, two side by side, live text between and last."""
    a, b, c = (engine.chunk(tokens(n, seed)) for n, seed in ((70, 1), (33, 2), (129, 3)))
    return Prompt((live(5, 10), a, b, live(9, 11), c, a, live(12, 12)))


@pytest.mark.parametrize("k", [0, 1, 16, 33, 70])
@pytest.mark.parametrize("name", ["llama", "llama-yarn", "qwen3"])
def test_law_1_link_is_the_models_own_forward_over_rerotated_keys(name: str, k: int) -> None:
    engine = engine_of(name)
    prompt = several_chunks(engine)
    check_law_1(engine, name, prompt, plan_link(prompt, k))


@pytest.mark.parametrize("name", ["qwen2", "mistral", "llama-llama3", "llama-linear", "llama-mqa"])
def test_law_1_holds_for_every_supported_kind_of_model(name: str) -> None:
    engine = engine_of(name)
    prompt = several_chunks(engine)
    check_law_1(engine, name, prompt, plan_link(prompt, 4))


def test_law_1_holds_up_to_four_thousand_positions() -> None:
    engine = engine_of("llama")
    far, near = engine.chunk(tokens(900, 1)), engine.chunk(tokens(400, 2))
    prompt = Prompt((live(2, 3), near, far, live(1500, 4), far, near, live(6, 5)))
    assert prompt.num_tokens > 4000
    check_law_1(engine, "llama", prompt, plan_link(prompt, 2))


@pytest.mark.parametrize("k", [0, 3])
def test_law_1_holds_for_a_chunk_at_the_end_and_one_at_position_0(k: int) -> None:
    engine = engine_of("llama")
    a, b = engine.chunk(tokens(40, 1)), engine.chunk(tokens(21, 2))
    for parts in [(a,), (a, b), (live(3, 4), a), (a, live(1, 5), b), (a, a)]:
        prompt = Prompt(parts)
        check_law_1(engine, "llama", prompt, plan_link(prompt, k))


@pytest.mark.parametrize("num_sink_tokens", [1, 4, 33])
@pytest.mark.parametrize("k", [0, 1, 16, 70])
@pytest.mark.parametrize("name", ["llama-bos", "llama-yarn-bos", "qwen3-bos"])
def test_law_1_holds_for_chunks_compiled_behind_dummy_sinks(name: str, k: int, num_sink_tokens: int) -> None:
    engine = engine_of(name, num_sink_tokens=num_sink_tokens)
    prompt = several_chunks(engine)
    check_law_1(engine, name, prompt, plan_link(prompt, k, num_sink_tokens=num_sink_tokens))
    first = Prompt(prompt.parts[1:])  # a chunk at position 0
    check_law_1(engine, name, first, plan_link(first, k, num_sink_tokens=num_sink_tokens))


def check_law_2(engine: Engine, name: str, prompt: Prompt, num_link_tokens: int) -> None:
    plan = plan_link(prompt, num_link_tokens, num_sink_tokens=engine.recipe.num_sink_tokens)
    assert not plan.fragments
    got = link_here(engine, prompt, plan)[0]
    expected = dense_forward(oracle_of(name), prompt.token_ids)[-1]
    assert relative_error([got], [expected]) <= LAW_2


@pytest.mark.parametrize("name", ["llama", "llama-yarn", "qwen2", "qwen3"])
def test_law_2_linking_with_k_of_a_chunks_length_is_full_recompute(name: str) -> None:
    engine = engine_of(name)
    for k in (129, 10_000):
        check_law_2(engine, name, several_chunks(engine), k)


def cut(engine: Engine, token_ids: list[int], *ends: int) -> list[Part]:
    """A document cut into chunks at the given places, inside a sentence as likely as not."""
    bounds = [0, *ends, len(token_ids)]
    return [engine.chunk(token_ids[start:end]) for start, end in pairwise(bounds)]


@pytest.mark.parametrize("num_sink_tokens", [0, 4])
@pytest.mark.parametrize("name", ["llama-bos", "qwen3-bos"])
def test_law_2_holds_for_cut_chunks_and_behind_sinks(name: str, num_sink_tokens: int) -> None:
    engine = engine_of(name, num_sink_tokens=num_sink_tokens)
    pieces = cut(engine, tokens(200, 6), 77, 78, 131)
    assert [len(part.token_ids) for part in pieces] == [77, 1, 53, 69]
    check_law_2(engine, name, Prompt((live(1, 7), *pieces, live(6, 8))), 77)


@pytest.mark.parametrize("num_sink_tokens", [0, 4])
def test_law_1_holds_for_cut_chunks(num_sink_tokens: int) -> None:
    engine = engine_of("llama-bos", num_sink_tokens=num_sink_tokens)
    prompt = Prompt((live(1, 7), *cut(engine, tokens(200, 6), 77, 78, 131), live(6, 8)))
    for k in (0, 16):
        check_law_1(engine, "llama-bos", prompt, plan_link(prompt, k))


def test_a_chunk_at_position_0_is_linked_only_where_it_was_compiled_behind_sinks() -> None:
    engine = engine_of("llama-bos", num_sink_tokens=4)
    prompt = Prompt((engine.chunk(tokens(40, 1)), live(5, 2)))
    assert plan_link(prompt, 16).num_reused(0) == 40
    assert plan_link(prompt, 16, num_sink_tokens=4).num_reused(0) == 24
    check_law_2(engine, "llama-bos", prompt, 40)


def test_recomputing_every_token_by_choice_is_full_recompute() -> None:
    engine = engine_of("llama")
    prompt = several_chunks(engine)
    got = link_here(engine, prompt, plan_recompute(prompt, range(prompt.num_tokens)))[0]
    expected = dense_forward(oracle_of("llama"), prompt.token_ids)[-1]
    assert relative_error([got], [expected]) <= LAW_2


def test_k_of_one_chunks_length_reuses_only_the_longer_ones() -> None:
    engine = engine_of("llama")
    prompt = several_chunks(engine)
    plan = plan_link(prompt, 33)
    assert {f.part_index for f in plan.fragments} == {1, 4, 5}


def test_a_chunk_at_position_0_is_reused_whole_and_exactly() -> None:
    engine = engine_of("qwen3")
    prompt = Prompt((engine.chunk(tokens(150, 1)), live(20, 2)))
    plan = plan_link(prompt, 16)
    assert plan.num_reused(0) == 150
    got = link_here(engine, prompt, plan)[0]
    assert relative_error([got], [dense_forward(oracle_of("qwen3"), prompt.token_ids)[-1]]) <= LAW_2


def test_linking_differs_from_full_recompute_where_it_approximates() -> None:
    engine = engine_of("llama")
    prompt = several_chunks(engine)
    got = link_here(engine, prompt, plan_link(prompt, 0))[0]
    assert relative_error([got], [dense_forward(oracle_of("llama"), prompt.token_ids)[-1]]) > 1e-2


def test_a_negative_number_of_link_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="num_link_tokens"):
        plan_link(Prompt.live([1, 2]), -1)


def test_a_run_of_another_length_than_its_part_is_refused_and_given_back() -> None:
    engine = engine_of("llama")
    part = engine.chunk(tokens(20))
    assert part.chunk_id is not None
    run = engine.compile(part.chunk_id, tokens(20)[:19])
    with pytest.raises(InvalidRequest, match=r"parts\[1\]"):
        engine.linked_context(Prompt((live(2, 1), part, live(2, 2))), {1: run})
    assert_nothing_held(engine)


# Plans, whatever the prompt

compositions = st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.integers(0, 3)), min_size=1, max_size=7)


def composed(engine: Engine, shape: list[tuple[int, bool, int]]) -> Prompt:
    """Parts of given lengths; chunks of equal length and seed are the same chunk."""
    return Prompt(tuple(engine.chunk(tokens(n, seed)) if is_chunk else live(n, seed) for n, is_chunk, seed in shape))


@st.composite
def plans(draw: st.DrawFn) -> tuple[Prompt, LinkPlan]:
    prompt = composed(engine_of("llama"), draw(compositions))
    if draw(st.booleans()):
        return prompt, plan_link(prompt, draw(st.integers(0, 10)))
    chosen = draw(st.sets(st.integers(0, prompt.num_tokens - 1)))
    return prompt, plan_recompute(prompt, chosen)


@given(plans())
@settings(max_examples=150, deadline=None)
def test_fragments_and_rows_cover_the_prompt_once(case: tuple[Prompt, LinkPlan]) -> None:
    prompt, plan = case
    reused = [f.offset + i for f in plan.fragments for i in range(f.start, f.end)]
    assert sorted([*reused, *plan.positions]) == list(range(prompt.num_tokens))
    assert list(plan.positions) == sorted(plan.positions)
    assert plan.positions[-1] == prompt.num_tokens - 1
    assert [prompt.token_ids[p] for p in plan.positions] == list(plan.token_ids)
    assert sum(plan.num_reused(i) for i in range(len(prompt.parts))) == len(reused)
    for f in plan.fragments:
        part, base = prompt.parts[f.part_index], sum(len(p.token_ids) for p in prompt.parts[: f.part_index])
        assert part.chunk_id is not None
        assert (f.offset, 0 <= f.start < f.end <= len(part.token_ids)) == (base, True)


@given(plans())
@settings(max_examples=150, deadline=None)
def test_every_row_sees_exactly_the_tokens_at_or_before_it(case: tuple[Prompt, LinkPlan]) -> None:
    _, plan = case
    for row, position in enumerate(plan.positions):
        seen = list(plan.positions[: row + 1])
        seen += [f.offset + i for f in plan.fragments if f.first_row <= row for i in range(f.start, f.end)]
        assert sorted(seen) == list(range(position + 1))


@given(plans())
@settings(max_examples=100, deadline=None)
def test_pieces_are_the_maximal_stretches_of_rows(case: tuple[Prompt, LinkPlan]) -> None:
    _, plan = case
    pieces = list(plan.pieces())
    assert [p for row, first, length in pieces for p in range(first, first + length)] == list(plan.positions)
    assert [row for row, _, _ in pieces] == [sum(length for _, _, length in pieces[:i]) for i in range(len(pieces))]
    assert all(first + length < later for (_, first, length), (_, later, _) in pairwise(pieces))


@given(case=plans())
@settings(max_examples=100, deadline=None)
def test_law_1_holds_for_every_composition_and_any_recomputed_set(case: tuple[Prompt, LinkPlan]) -> None:
    prompt, plan = case
    check_law_1(engine_of("llama", num_blocks=64), "llama", prompt, plan)


@pytest.mark.parametrize(("size", "reused"), [(19, 0), (20, 4), (40, 24)])
def test_a_chunk_with_too_little_left_to_reuse_is_recomputed_whole(size: int, reused: int) -> None:
    engine = engine_of("llama")
    prompt = Prompt((Part((1,)), engine.chunk(tokens(size, seed=3)), Part((2, 3))))
    plan = plan_link(prompt, 16, min_reused_tokens=4)
    assert plan.num_reused(1) == reused
    assert len(plan.positions) == prompt.num_tokens - reused
    check_law_1(engine, "llama", prompt, plan)
