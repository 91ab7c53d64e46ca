"""Samples of one prompt and trees of them: each as if it were alone, over one copy of what they share."""

from __future__ import annotations

import pytest
from engine_worlds import assert_nothing_held, engine_of, only_in_extents, tokens

from spolia_core.errors import Busy, InvalidRequest
from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_engine.core import EngineCore
from spolia_engine.extent import BlockState
from spolia_engine.next_tokens import accept_row
from spolia_engine.sequence import Sequence, close_all
from spolia_engine.sequence_starts import branch, start_sequence

pytestmark = pytest.mark.usefixtures("place")

DRAWN = SamplingParams(temperature=1.0, seed=7, max_tokens=12, ignore_eos=True)
PROMPT = Prompt((Part(tuple(tokens(150))),))


def held_blocks(core: EngineCore) -> int:
    return core.pool.counts()[BlockState.REFERENCED]


def test_samples_differ_and_the_first_is_the_answer_of_one() -> None:
    answers = engine_of().generate_samples(PROMPT, 4, DRAWN)
    assert len({answer.token_ids for answer in answers}) == 4
    assert answers[0].token_ids == engine_of().generate(PROMPT, DRAWN).token_ids
    again = engine_of().generate_samples(PROMPT, 2, DRAWN)
    assert [answer.token_ids for answer in again] == [answer.token_ids for answer in answers[:2]], "whoever else draws"


def test_greedy_samples_are_alike() -> None:
    answers = engine_of().generate_samples(PROMPT, 3, SamplingParams(max_tokens=9, ignore_eos=True))
    assert len({answer.token_ids for answer in answers}) == 1


@only_in_extents
@pytest.mark.parametrize("mode", list(ReuseMode), ids=lambda mode: mode.name)
def test_the_prompt_is_held_once(mode: ReuseMode) -> None:
    one, eight = (blocks_while_decoding(mode, num_samples) for num_samples in (1, 8))
    assert eight == one + 7, "a block for each further sample, which has a token"


def blocks_while_decoding(mode: ReuseMode, num_samples: int) -> int:
    engine = engine_of()
    prompt = Prompt((Part(tuple(tokens(3))), engine.chunk(tokens(128, 1)), Part(tuple(tokens(9, 2)))))
    seen: list[int] = []
    step = engine.decoding.step_logits

    def counting(sequences: list[Sequence]) -> object:
        seen.append(held_blocks(engine))
        return step(sequences)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.decoding, "step_logits", counting)
        engine.generate_samples(prompt, num_samples, SamplingParams(max_tokens=2, ignore_eos=True), mode=mode)
    assert_nothing_held(engine)
    return seen[-1]


def test_no_samples_are_refused_and_none_is_held_where_room_lacks() -> None:
    engine = engine_of(num_blocks=12)
    with pytest.raises(InvalidRequest, match="num_samples"):
        engine.generate_samples(PROMPT, 0)
    with pytest.raises(Busy):
        engine.generate_samples(PROMPT, 4, DRAWN)
    assert_nothing_held(engine)


def run(core: EngineCore, sequences: list[Sequence], num_tokens: int) -> None:
    for _ in range(num_tokens):
        for sequence, logits in zip(sequences, core.decoding.step_logits(sequences), strict=True):
            accept_row(sequence.generation, logits)


def started(core: EngineCore) -> Sequence:
    context = core.exact_context(PROMPT.token_ids, [])
    token = core.decoding.first_token(context, DRAWN)
    sequence = start_sequence(context, core.generation(DRAWN))
    sequence.generation.accept(token)
    return sequence


def test_branches_of_branches_go_on_as_if_each_were_alone() -> None:
    """A tree two deep, stepped together, against each path from its root to a leaf, sampled alone."""
    core = engine_of()
    root = started(core)
    run(core, [root], 3)
    before = held_blocks(core)
    middle = branch(root, [1, 2])
    assert held_blocks(core) == before + 1 + 2, "the tail once, and a block for what each writes"
    run(core, [root, *middle], 3)
    leaves = branch(middle[0], [3])
    everyone = [root, *middle, *leaves]
    run(core, everyone, 4)
    paths = [[0] * 11, [0] * 4 + [1] * 7, [0] * 4 + [2] * 7, [0] * 4 + [1] * 3 + [3] * 4]
    found = [sequence.generation.token_ids for sequence in everyone]
    close_all(everyone)
    core.decoding.forget_plan()
    assert_nothing_held(core)
    assert found == [path_alone(path) for path in paths]
    assert len({tuple(ids) for ids in found}) == 4


def path_alone(path: list[int]) -> list[int]:
    """Token i drawn as sample path[i] would."""
    core = engine_of()
    sequence = started(core)
    for index in path[1:]:
        sequence.generation.sample_index = index
        run(core, [sequence], 1)
    sequence.close()
    core.decoding.forget_plan()
    return sequence.generation.token_ids


def test_a_branch_outlives_what_it_came_from() -> None:
    core = engine_of()
    root = started(core)
    run(core, [root], 2)
    (other,) = branch(root, [1])
    run(core, [root, other], 2)
    root.close()
    core.decoding.forget_plan()
    run(core, [other], 3)
    assert other.generation.token_ids == path_alone([0] * 3 + [1] * 5)
    other.close()
    assert_nothing_held(core)


def test_a_branch_without_room_holds_nothing() -> None:
    core = engine_of(num_blocks=12)
    root = started(core)
    run(core, [root], 2)
    before = held_blocks(core)
    with pytest.raises(Busy):
        branch(root, [1, 2, 3])
    assert held_blocks(core) == before
    root.close()
    assert_nothing_held(core)
